"""The page of `mutor show`: over HTTP, and in a real browser where there is one."""

import base64
import http.client
import io
import json
import math
import shlex
import shutil
import socket
import struct
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_vision.commands.show import MOST_IMAGES, serve
from mutor_vision.runtime import Runtime
from mutor_vision.sampling.draw import SampleSettings, filtered_probabilities
from mutor_vision.sampling.entropy import token_entropies
from mutor_vision.sampling.generate import generate
from mutor_vision.sampling.load import load

ASKED = {"classes": [4, 1], "each": 2, "seed": 3, "cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
         "decode": "plain"}  # fmt: skip


@pytest.fixture
def server(trained_run):
    run = str(trained_run)
    server = serve({run: load(run, Runtime(0, 1, torch.device("cpu"), None))}, port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def answered(server, method="POST", path="/draw", asked=None, host=None, kind="application/json"):
    """(status, headers, text) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    headers = {"Content-Type": kind, "Host": host or f"127.0.0.1:{server.server_port}"}
    connection.request(method, path, json.dumps(asked) if asked is not None else None, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def events(server, **changes):
    status, _, text = answered(server, asked=ASKED | changes)
    assert status == 200
    return [json.loads(line) for line in text.splitlines()]


def pixels(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


@pytest.mark.parametrize("decode", ["plain", "forecast"])
def test_the_command_it_shows_makes_the_same_pictures(server, command, tmp_path, monkeypatch, decode):
    found = events(server, decode=decode, top_k=20)
    shown = [pixels(source) for source in found[-2]["images"]]
    words = shlex.split(found[-1]["command"])
    monkeypatch.chdir(tmp_path)
    result = command(*words)
    assert result.code == 0, result.err
    grid = np.asarray(Image.open(tmp_path / words[words.index("--out") + 1]))
    left = grid.shape[1] - (2 * 132 + 4)
    for number, picture in enumerate(shown):
        top, start = 4 + 132 * (number // 2), left + 4 + 132 * (number % 2)
        assert (grid[top : top + 128 : 8, start : start + 128 : 8] == picture).all()  # enlarged eight times


def test_the_grid_grows_row_by_row(server):
    *growing, last, _ = events(server)
    assert [event["rows"] for event in growing] == [1, 2, 3] and last["rows"] == 4
    assert [pixels(event["images"][0]).shape for event in growing] == [(4 * rows, 16, 3) for rows in (1, 2, 3)]
    assert last["passes"] == last["tokens"] == 16 and np.shape(last["entropy"]) == (4, 4, 4)
    assert events(server, decode="forecast")[0]["passes"] <= 16


def picture(folder):
    """A file of an image, and what a page sends of it."""
    path = folder / "my photo.png"
    pixels = np.random.default_rng(0).integers(256, size=(20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path, {"name": path.name, "content": base64.b64encode(path.read_bytes()).decode()}


@pytest.mark.parametrize("decode", ["plain", "forecast"])
def test_an_image_is_completed_as_the_command_does_it(server, command, tmp_path, monkeypatch, decode):
    path, image = picture(tmp_path)
    original, *_, last, again = events(server, image=image, keep_rows=3, decode=decode)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(again["command"])
    assert words[words.index("--image") + 1] == path.name and words[words.index("--keep-rows") + 1] == "3"
    result = command(*words)
    assert result.code == 0, result.err
    grid = np.asarray(Image.open(tmp_path / words[words.index("--out") + 1]))
    shown = [original["original"], *last["images"][:2], original["original"], *last["images"][2:]]
    left = grid.shape[1] - (3 * 132 + 4)
    for number, source in enumerate(shown):  # of each class the image, then two completions
        top, start = 4 + 132 * (number // 3), left + 4 + 132 * (number % 3)
        assert (grid[top : top + 128 : 8, start : start + 128 : 8] == pixels(source)).all()


@pytest.mark.parametrize("changes, says", [
    ({"image": {"name": "a.png", "content": "QUJD"}, "keep_rows": 2}, "a.png: not a complete image"),
    ({"image": {"name": "a.png", "content": "*"}, "keep_rows": 2}, "cannot read this"),
    ({"image": "x", "keep_rows": 2}, "cannot read this"),
    ({"keep_rows": 4}, "expected 1 to 3"),
])  # fmt: skip
def test_an_image_that_cannot_be_completed_is_told(server, tmp_path, changes, says):
    (told,) = events(server, **({"image": picture(tmp_path)[1]} | changes))
    assert says in told["error"]


def test_mistakes_are_told_on_the_page(server):
    for changes, told in (
        ({"classes": []}, "choose one class"), ({"classes": [99]}, "of 0 to 4"),
        ({"each": MOST_IMAGES}, f"1 to {MOST_IMAGES} images"), ({"each": 0}, "images"), ({"seed": -1}, "seed"),
        ({"temperature": -1}, "temperature"), ({"cfg_scale": None}, "cannot read"), ({"top_p": 2}, "top_p"),
    ):  # fmt: skip
        found = events(server, **changes)
        assert len(found) == 1 and told in found[0]["error"], found


def test_only_this_machines_own_page_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"
    status, headers, text = answered(server, "GET", "/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"] and "bee" in text
    assert answered(server, "GET", "/", host="evil.example:80")[0] == 404  # a name that resolves to 127.0.0.1
    assert answered(server, asked=ASKED, host="evil.example:80")[0] == 404
    assert answered(server, asked=ASKED, kind="text/plain")[0] == 404  # what another site's form can send
    for path in ("/../show.py", "/etc/passwd", "//etc/passwd", "/%2e%2e/show.py", "/show.html"):
        assert answered(server, "GET", path)[0] == 404
    assert answered(server, path="/", asked=ASKED)[0] == 404


def sent(server, *lines, content=b"", close=False):
    """The first line of the answer to a request written by hand; close: the page goes away at once."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        lines = (
            "POST /draw HTTP/1.0",
            f"Host: 127.0.0.1:{server.server_port}",
            "Content-Type: application/json",
            *lines,
        )
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        if close:  # with a reset, so that the next thing that is written fails
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return ""
        return connection.makefile("rb").readline().decode().strip()


@pytest.mark.parametrize("length", ["many", "-1", "0", "1e3", "", "999999999"])
@pytest.mark.bad_input("command line")
def test_a_length_that_is_none_is_refused(server, capfd, length):
    assert "404" in sent(server, f"Content-Length: {length}")
    assert capfd.readouterr().err == ""


def test_a_page_that_goes_away_ends_its_drawing_quietly(server, capfd):
    content = json.dumps(ASKED | {"each": 8}).encode()
    sent(server, f"Content-Length: {len(content)}", content=content, close=True)
    assert events(server)[-1]["command"]  # the next is drawn when that one has ended
    assert capfd.readouterr().err == ""


def test_a_class_name_cannot_leave_the_script(trained_run):
    import dataclasses

    loaded = load(trained_run, Runtime(0, 1, torch.device("cpu"), None))
    loaded = dataclasses.replace(loaded, class_names=["</script><script>alert(1)</script>", *loaded.class_names[1:]])
    server = serve({"run": loaded}, port=0)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    text = answered(server, "GET", "/")[2]
    thread.join()
    server.server_close()
    assert "alert(1)" in text and text.count("<script>") == 1 and "</script><script>alert" not in text


def test_entropies_are_those_of_the_draws(random_model):
    """Of the very distributions that decoding draws from."""
    seen = []

    def noted(logits, settings):
        seen.append(filtered_probabilities(logits, settings))
        return seen[-1]

    model, labels = random_model.eval(), torch.tensor([0, 3, 1])
    for settings in (SampleSettings(), SampleSettings(cfg_scale=3, cfg_interval=(2, 7)), SampleSettings(1, top_k=5)):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mutor_vision.sampling.decode.filtered_probabilities", noted)
            codes = generate(model, labels, settings, seed=1, indices=np.arange(3))
        expected = torch.stack([torch.special.entr(each).sum(-1) for each in seen], 1).view(3, 4, 4)
        found = token_entropies(model, codes, labels, settings)
        assert torch.allclose(found, expected, atol=1e-4) and found.max() <= math.log(32)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(server, tmp_path, width):
    """Two classes are picked, drawn, and found on the page, which fits the window."""
    selenium = pytest.importorskip("selenium.webdriver")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs chromium and chromedriver on PATH")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    options = selenium.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                 f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(flag)
    with selenium.Chrome(options, selenium.ChromeService(driver)) as page:
        # A window cannot be as narrow as a phone; what the page sees can.
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                             {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
        page.get(f"http://127.0.0.1:{server.server_port}/")
        classes = Select(page.find_element(By.ID, "classes"))
        classes.deselect_all()
        classes.select_by_value("2")
        classes.select_by_value("4")
        page.find_element(By.ID, "overlay").click()
        page.find_element(By.ID, "draw").click()
        WebDriverWait(page, 60).until(lambda page: page.find_element(By.ID, "again").is_displayed())
        images = page.find_elements(By.CSS_SELECTOR, "#runs img")
        assert len(images) == 8
        assert all(page.execute_script("return arguments[0].naturalWidth", image) == 16 for image in images)
        assert all(image.size["width"] >= 96 for image in images)
        names = [caption.text for caption in page.find_elements(By.CSS_SELECTOR, "#runs figcaption")]
        assert len(set(names)) == 2 and len(page.find_elements(By.CSS_SELECTOR, "canvas:not([hidden])")) == 8
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert "--classes 2,4" in page.find_element(By.ID, "command").text
        page.save_screenshot(str(tmp_path / f"{width}.png"))
        page.find_element(By.ID, "image").send_keys(str(picture(tmp_path)[0]))
        assert page.find_element(By.ID, "keep_rows").get_attribute("value") == "2"
        page.find_element(By.ID, "draw").click()
        WebDriverWait(page, 60).until(lambda page: page.find_element(By.ID, "again").is_displayed())
        assert page.find_element(By.ID, "original").is_displayed()
        assert "--image 'my photo.png' --keep-rows 2" in page.find_element(By.ID, "command").text
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        page.save_screenshot(str(tmp_path / f"{width}-completed.png"))
        assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"
                    and "favicon" not in entry["message"]]  # fmt: skip
