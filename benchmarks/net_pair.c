// The guest's side of a network measurement, static and small: one TCP connection to the host.
//
//     net_pair send ADDRESS PORT BYTES      writes that many bytes, waits for the other side's end
//     net_pair receive ADDRESS PORT BYTES   reads until they have come
//     net_pair echo ADDRESS PORT COUNT      gives COUNT bytes back, each when it has come
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[1 << 18];

static int fail(const char* what) {
    perror(what);
    return 1;
}

int main(int argc, char** argv) {
    if (argc != 5) return 2;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[3]))};
    inet_pton(AF_INET, argv[2], &to.sin_addr);
    long long left = atoll(argv[4]);
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr*)&to, sizeof to) != 0) return fail("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (strcmp(argv[1], "send") == 0) {
        memset(buffer, 'x', sizeof buffer);
        while (left > 0) {
            ssize_t n = write(fd, buffer, left < (long long)sizeof buffer ? left : sizeof buffer);
            if (n <= 0) return fail("write");
            left -= n;
        }
        shutdown(fd, SHUT_WR);
        while (read(fd, buffer, sizeof buffer) > 0) {
        }
    } else if (strcmp(argv[1], "receive") == 0) {
        while (left > 0) {
            ssize_t n = read(fd, buffer, sizeof buffer);
            if (n <= 0) return fail("read");
            left -= n;
        }
        if (write(fd, "", 1) != 1) return fail("write");
    } else {
        for (; left > 0; --left) {
            if (read(fd, buffer, 1) != 1) return fail("read");
            if (write(fd, buffer, 1) != 1) return fail("write");
        }
    }
    return 0;
}
