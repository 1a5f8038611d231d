"""A plain server of an exported folder for the web, with the headers without which pages get no threads."""

import socket
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.options.generate import DemoOptions
from bksdm.runtime.files import MANIFEST

HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
_MOST_PORTS = 65535


def serve_web(options: DemoOptions) -> None:
    """Serve the folder that the options name until it is interrupted.

    Raises:
        InputError: The folder is none, nothing can listen there, or an option is for models.
    """
    others = [name for name, value in _changed(options) if name not in ("web", "host", "port")]
    if others:
        raise InputError(f"{others[0]} is given with web, which is a folder that says itself how to draw; leave it out")
    with server(str(options.web), options.host, options.port) as opened:
        host = f"[{options.host}]" if ":" in options.host else options.host
        say(f"http://{host}:{opened.server_port} (Ctrl-C ends it)")
        opened.serve_forever()


def _changed(options: DemoOptions) -> list[tuple[str, object]]:
    """The options that are not as they are by default."""
    usual = asdict(DemoOptions())
    return [(name, value) for name, value in asdict(options).items() if value != usual[name]]


class _Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class Files(SimpleHTTPRequestHandler):
    """Files with the headers, asked for anew at every visit and not logged."""

    headers_sent: ClassVar[dict[str, str]] = HEADERS
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        for name, value in {**self.headers_sent, "Cache-Control": "no-cache"}.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


def server(folder: str, host: str, port: int, kind: type[Files] = Files) -> ThreadingHTTPServer:
    """The server of a folder, which listens; `serve_forever` answers.

    Arguments:
        folder: What `bksdm export --to web` wrote.
        host: Address to listen at.
        port: Port; 0 for a free one.
        kind: What answers.

    Raises:
        InputError: The folder is none, or nothing can listen there.
    """
    if not 0 <= port <= _MOST_PORTS:
        raise InputError(f"port is {port}; give one from 0, which takes a free one, to {_MOST_PORTS}")
    if not (Path(folder) / MANIFEST).is_file():
        raise InputError(f"web is {folder}, which has no {MANIFEST}; give a folder of bksdm export --to web")
    try:
        families = {found[0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        listening = ThreadingHTTPServer if socket.AF_INET in families else _Server6
        return listening((host, port), partial(kind, directory=folder))
    except socket.gaierror as error:
        raise InputError(f"host is {host}, which is no address here ({error.strerror}); give another --host") from error
    except OSError as error:
        raise InputError(f"cannot listen at {host}:{port} ({error.strerror}); give another --port or --host") from error
