"""A page on this machine that shows one question after another."""

import logging
import secrets
import socket
import webbrowser
from pathlib import Path
from threading import Thread
from typing import Any

from flask import Blueprint, Flask, Response, request
from werkzeug.serving import BaseWSGIServer, make_server

from ppo_kernels.trainer.config import InputError
from ppo_kernels.trainer.rating.queue import Queue, Stale

STATIC = Path(__file__).parent / "static"
ADDRESS = "127.0.0.1"


def ask(queue: Queue, port: int, open_page: bool) -> None:
    """Serve the page until its user has finished, or Ctrl-C."""
    token = secrets.token_urlsafe(16)  # other users of the machine cannot guess the address
    app = make_app(queue, token)
    try:
        bound = socket.create_server((ADDRESS, port))
    except OSError as error:
        raise InputError(
            f"port: given {port}, which cannot be used ({error.strerror}); "
            "expected a free one, or 0 for any"
        ) from error
    port = bound.getsockname()[1]
    with bound:
        server = make_server(ADDRESS, port, app, threaded=True, fd=bound.fileno())
    app.extensions["server"] = server
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not every request
    url = f"http://{ADDRESS}:{port}/{token}/"
    print(f"{url}\nCtrl-C ends; every answer is in {queue.path} at once", flush=True)
    if open_page:
        Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


def make_app(queue: Queue, token: str) -> Flask:
    """Return the page below /token/, answering to the names of this machine only."""
    app = Flask(__name__, static_folder=None)
    app.config["TRUSTED_HOSTS"] = [ADDRESS, "localhost"]
    page = Blueprint("page", __name__, url_prefix=f"/{token}", static_folder=STATIC)

    @page.get("/")
    def index() -> Response:
        return page.send_static_file("index.html")

    @page.get("/state")
    def state() -> dict[str, Any]:
        return {"options": queue.options, "file": str(queue.path), **queue.state()}

    @page.post("/answer")
    def answer() -> Any:
        given = request.get_json()
        option = given.get("option") if isinstance(given, dict) else None
        if type(option) is not int or not 1 <= option <= queue.options:
            return {"error": f"option: given {option!r}, expected 1 to {queue.options}"}, 400
        queue.answer(given.get("key"), option)
        return state()

    @page.post("/skip")
    def skip() -> Any:
        given = request.get_json()
        queue.skip(given.get("key") if isinstance(given, dict) else None)
        return state()

    @page.post("/undo")
    def undo() -> Any:
        request.get_json()
        queue.undo()
        return state()

    @page.post("/finish")
    def finish() -> Any:
        request.get_json()
        server: BaseWSGIServer = app.extensions["server"]
        Thread(target=server.shutdown, daemon=True).start()
        return state()

    @page.errorhandler(Stale)
    def stale(_: Stale) -> Any:
        return {"error": "this was answered elsewhere"}, 409

    @page.errorhandler(OSError)
    def unwritable(error: OSError) -> Any:
        return {"error": f"{queue.path} cannot be written: {error.strerror or error}"}, 507

    @app.after_request
    def guard(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response

    app.register_blueprint(page)
    return app
