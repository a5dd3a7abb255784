"""The host's side of network tests: small servers, each on a thread, and what a guest runs."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

#: Takes an address by DHCP, and says which.
DHCP = """
mkdir -p /tmp
cat > /tmp/dhcp <<'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/24 dev $interface
ip route add default via $router
echo "address $ip router $router dns $dns"
END
chmod +x /tmp/dhcp
ip link set eth0 up
udhcpc -i eth0 -s /tmp/dhcp -n -q 2>/dev/null
"""


def read_all(connection: socket.socket) -> bytes:
    data = bytearray()
    while part := connection.recv(1 << 18):
        data += part
    return bytes(data)


@contextlib.contextmanager
def serving(
    *services: Callable[[socket.socket], object], host: str = "127.0.0.1"
) -> Iterator[list[int]]:
    """A TCP port of the host for each service, which is called with each connection, in turn. An
    exception in one is raised at the end."""
    servers = [socket.create_server((host, 0)) for _ in services]
    failures: list[BaseException] = []

    def serve(server: socket.socket, service: Callable[[socket.socket], object]) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return  # closed
            try:
                with connection:
                    connection.settimeout(30)
                    service(connection)
            except OSError as failure:
                failures.append(failure)

    threads = [
        threading.Thread(target=serve, args=pair, daemon=True)
        for pair in zip(servers, services, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield [server.getsockname()[1] for server in servers]
    finally:
        for server in servers:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
        for thread in threads:
            thread.join(10)
    if failures:
        raise failures[0]
