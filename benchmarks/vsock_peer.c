// The guest's side of bench_virtio_console.py: listens on vsock port 7000. The first byte of a
// connection says what for: 'e' echo, 's' take bytes and answer one when the host ends, 'g' send
// until the host hangs up.
#include <linux/vm_sockets.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

static char bytes[65536];

static void serve(int fd) {
    char what;
    ssize_t got;
    if (read(fd, &what, 1) != 1) return;
    while (what == 'e' && (got = read(fd, bytes, sizeof bytes)) > 0) {
        if (write(fd, bytes, (size_t)got) != got) return;
    }
    if (what == 's') {
        while (read(fd, bytes, sizeof bytes) > 0) {
        }
        if (write(fd, "x", 1) != 1) return;
    }
    while (what == 'g' && write(fd, bytes, sizeof bytes) > 0) {
    }
}

int main(void) {
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_port = 7000, .svm_cid = VMADDR_CID_ANY};
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    signal(SIGPIPE, SIG_IGN);
    if (bind(listener, (struct sockaddr*)&address, sizeof address) || listen(listener, 8)) return 1;
    for (;;) {
        int fd = accept(listener, 0, 0);
        serve(fd);
        close(fd);
    }
}
