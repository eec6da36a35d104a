"""A page to look at what a run draws: classes by name, guidance and filtering, the grid as it grows row by row, how
sure the model was of each token, an image of one's own completed from its first rows, and two runs side by side with
the same seeds.

    mutor show runs/mutor-2d
    mutor show runs/mutor-2d runs/next-token --port 8000

It answers to this machine alone; from another one: ssh -L 8000:127.0.0.1:8000 HOST. Ctrl-C ends it.
"""

import argparse
import base64
import contextlib
import dataclasses
import io
import json
import math
import shlex
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mutor_vision.data.images import read_image, to_pil
from mutor_vision.errors import UserError
from mutor_vision.keyed_random import check_seed
from mutor_vision.names import in_words
from mutor_vision.runtime import start
from mutor_vision.sampling.completion import completing
from mutor_vision.sampling.decode import Plain
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.entropy import token_entropies
from mutor_vision.sampling.forecast import Forecast, most_drafts
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.load import LoadedModel, load
from mutor_vision.sampling.stream import decode_images

MOST_IMAGES = 64  # of one request
MOST_BYTES = 32_000_000  # of one request, in which there may be an image
# Sent with every answer: the page is its own, and nothing else may be loaded, framed or run in it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
                               "'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="one or two run directories or checkpoints")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1 (default 8000), 0 = any that is free")
    parser.add_argument("--weights", default="best", help="best (default: EMA where there is one), ema, model, or "
                        "another that `mutor info` lists")  # fmt: skip
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def main(arguments: argparse.Namespace) -> None:
    if len(arguments.runs) > 2:
        raise UserError(f"{len(arguments.runs)} runs are given, expected one, or two to compare")
    if not 0 <= arguments.port < 65536:
        raise UserError(f"--port is {arguments.port}, expected 0 to 65535")
    runtime = start(arguments.precision, arguments.device)
    loaded = {run: load(run, runtime, arguments.weights) for run in dict.fromkeys(arguments.runs)}
    names = [model.class_names for model in loaded.values()]
    if names[0] != names[-1]:
        raise UserError("the two runs have other classes; give runs on the same classes")
    try:
        server = serve(loaded, arguments.port)
    except OSError as error:
        reason = f"port {arguments.port} of 127.0.0.1 cannot be opened ({error.strerror})"
        raise UserError(f"{reason}; give another --port") from None
    print(f"look at http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def serve(loaded: dict[str, LoadedModel], port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 for runs by the path that the user gave; call its serve_forever. One request draws at a
    time."""
    page = files("mutor_vision.commands").joinpath("show.html").read_text("utf-8")
    first = next(iter(loaded.values()))
    about = {
        "runs": [{"path": path, "weights": model.identity["weights"], "checkpoint": model.identity["checkpoint"],
                  "guidance": model.config.label_dropout > 0} for path, model in loaded.items()],
        "classes": [in_words(name) for name in first.class_names], "grid": first.config.model.grid,
        "codes": first.config.model.vocab_size,
        "most_images": MOST_IMAGES,
    }  # fmt: skip
    # '<' would let a class's name end the script that holds it.
    content = page.replace("/*ABOUT*/null", json.dumps(about).replace("<", "\\u003c")).encode()
    drawing = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # an answer ends with its connection

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a page that has gone away wants no answer
                super().handle()

        def do_GET(self) -> None:
            if self._is_ours() and self.path == "/":
                self._begin(200, "text/html; charset=utf-8")
                self.wfile.write(content)
            else:
                self._begin(404, "text/plain")

        def do_POST(self) -> None:
            told = self.headers.get("Content-Length", "") if self._is_ours() else ""
            length = int(told) if told.isdecimal() else 0
            # Another site's page cannot send this type without asking first, and is never allowed to.
            is_json = self.headers.get_content_type() == "application/json"
            if self.path != "/draw" or not is_json or not 0 < length < MOST_BYTES:
                self._begin(404, "text/plain")
                return
            content = self.rfile.read(length)
            self._begin(200, "application/x-ndjson")
            try:
                with drawing:
                    draw_all(loaded, json.loads(content), self._send)
            except (UserError, ValueError, KeyError, TypeError) as error:
                self._send({"error": str(error) if isinstance(error, UserError) else f"cannot read this: {error!r}"})

        def _is_ours(self) -> bool:
            """Whether the browser asked for this machine by its name: a page that has its own name resolve to
            127.0.0.1 is refused."""
            return self.headers.get("Host", "").rpartition(":")[0] in ("127.0.0.1", "localhost")

        def _begin(self, code: int, kind: str) -> None:
            self.send_response(code)
            for name, value in _HEADERS.items() | {("Content-Type", kind)}:
                self.send_header(name, value)
            self.end_headers()

        def _send(self, event: dict) -> None:
            self.wfile.write(json.dumps(event).encode() + b"\n")
            self.wfile.flush()

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server


def draw_all(loaded: dict[str, LoadedModel], asked: dict, send: Callable[[dict], None]) -> None:
    """What a page asked for -> events: {'run', 'images'} while the images grow, {'run', 'images', 'entropy', 'passes'}
    when those of a run are done, {'command'} at the end; {'original'}, the image as the tokenizer gets it, before those
    of a run that completes one. Raises UserError, and what reading another structure raises.
    A page that has gone away ends the drawing with a ConnectionError."""
    names = next(iter(loaded.values())).class_names
    classes, each = [int(label) for label in asked["classes"]], int(asked["each"])
    if not classes or not all(0 <= label < len(names) for label in classes):
        raise UserError(f"choose one class or more, of 0 to {len(names) - 1}")
    if not 1 <= len(classes) * each <= MOST_IMAGES:
        raise UserError(f"{len(classes)} classes of {each} images each; expected 1 to {MOST_IMAGES} images in all")
    seed = int(asked["seed"])
    check_seed(seed, "the seed")
    settings = SampleSettings(
        cfg_scale=float(asked["cfg_scale"]), temperature=float(asked["temperature"]), top_k=int(asked["top_k"]),
        top_p=float(asked["top_p"]),
    )  # fmt: skip
    labels = torch.tensor(classes).repeat_interleave(each)
    given, picture, rows_kept = asked.get("image"), None, 0
    if given:
        picture = read_image(str(given["name"]), base64.b64decode(given["content"], validate=True))
        rows_kept = int(asked["keep_rows"])
    for path, model in loaded.items():
        whole = model.transformer  # which says how sure it was, of kept codes too
        if picture is not None:
            model, original = completing(model, picture, rows_kept)
            send({"original": _png(original)})
        if settings.cfg_scale != 1 and not model.config.label_dropout:
            raise UserError(f"{path} was trained with label_dropout 0 and has no null class; set guidance to 1")
        grid = model.config.model.grid
        forecast = Forecast(8, min(2, most_drafts(model.config))) if asked["decode"] == "forecast" else None

        def grown(codes: Tensor, path=path, model=model, grid=grid) -> None:
            if codes.shape[1] % grid[1] == 0 and codes.shape[1] < math.prod(grid):
                rows = codes.shape[1] // grid[1]
                padded = torch.nn.functional.pad(codes, (0, math.prod(grid) - codes.shape[1])).unflatten(1, grid)
                pictures = decode_images(model, padded)
                height = pictures.shape[2] * rows // grid[0]
                send({"run": path, "images": [_png(picture[:, :height]) for picture in pictures], "rows": rows})

        with model.runtime.autocast():
            codes = generate(
                model.transformer, labels.to(model.runtime.device), settings, seed=seed,
                indices=np.arange(len(labels)), decoder=forecast or Plain(grown),
            )  # fmt: skip
            entropy = token_entropies(whole, codes, labels.to(codes.device), settings)
        tokens = math.prod(grid)
        send({
            "run": path, "images": [_png(picture) for picture in decode_images(model, codes)], "rows": grid[0],
            "entropy": np.round(entropy.cpu().numpy().astype(float), 3).tolist(), "tokens": tokens,
            "passes": round(forecast.passes / len(labels), 1) if forecast else tokens,
        })  # fmt: skip
    more = ["--decode", asked["decode"]] if forecast else []
    more += ["--image", given["name"], "--keep-rows", rows_kept] if given else []
    send({"command": "\n".join(_command(path, classes, each, seed, settings, more) for path in loaded)})


def _command(path: str, classes: list[int], each: int, seed: int, settings: SampleSettings, more: list) -> str:
    """The command that makes the same picture."""
    words = ["mutor", "sample", path, "--classes", ",".join(map(str, classes)), "--per-class", each, "--seed", seed]
    for field in dataclasses.fields(settings):
        if (value := getattr(settings, field.name)) != field.default:
            words += [f"--{field.name.replace('_', '-')}", f"{value:g}"]
    return shlex.join(map(str, [*words, *more, "--out", f"{Path(path).name or 'grid'}.png"]))


def _png(picture: Tensor) -> str:
    """uint8 (3, H, W) -> a data URI."""
    file = io.BytesIO()
    to_pil(picture).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
