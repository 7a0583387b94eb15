"""Stand-ins for what jax asks on a TPU host: chips on the PCI bus, libtpu, the metadata server."""

import contextlib
import http.server
import pathlib
import threading
from collections.abc import Iterator, Mapping

# Chips of v5e, as the kernel shows them: Google's number of a vendor, and the device's.
CHIP = {"vendor": "0x1ae0\n", "device": "0x0063\n"}

# jax looks for chips by this pattern alone.
SITE = """
import glob

real = glob.glob

def found(pattern, *arguments, **options):
    return real(pattern.replace("/sys/bus/pci/devices", {folder!r}), *arguments, **options)

glob.glob = found
"""


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Variables with which jax takes this machine for a TPU host; files are written to `folder`."""
    for number in range(4):
        chip = folder / "pci" / f"0000:00:0{number}.0"
        chip.mkdir(parents=True)
        for name, text in CHIP.items():
            (chip / name).write_text(text)
    (folder / "sitecustomize.py").write_text(SITE.format(folder=str(folder / "pci")))
    library = folder / "libtpu.so"
    library.touch()
    return {"PYTHONPATH": str(folder), "TPU_LIBRARY_PATH": str(library)}


def attributes_of(number: int, hosts: int) -> dict[str, str]:
    """What Google's server says on TPU VM `number` of a slice."""
    return {
        "agent-worker-number": str(number),
        "worker-network-endpoints": ",".join(["localhost"] * hosts),
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'",
    }


@contextlib.contextmanager
def metadata_server(attributes: Mapping[str, str]) -> Iterator[str]:
    """Address of a server that knows these attributes of the instance, and answers 404 to others.

    `attributes_of` has those of a TPU VM. On GKE there are none of them.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            if name not in attributes or self.headers["Metadata-Flavor"] != "Google":
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(attributes[name].encode())

        def log_message(self, format: str, *arguments: object) -> None:
            del format, arguments

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
