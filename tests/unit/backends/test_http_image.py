"""What travels to a server: the JPEG itself without its notes, or an image encoded anew; and to our server, more."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.backends.faulty_server import running
from tests.unit.backends.test_http_captioner import image, run, settings_for
from vila2.backends import OUR_SERVER, open_captioner
from vila2.backends.http_captioner import HttpCaptioner, choose_model
from vila2.backends.http_client import ServedModel
from vila2.backends.http_image import ImageEncoder, bare_jpeg
from vila2.data.decode import decode_image
from vila2.types import CaptionRequest, RepetitionRule, SamplingParams


def jpeg(size: tuple[int, int] = (40, 60), mode: str = "RGB", orientation: int = 1, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    picture, buffer = Image.fromarray(pixels).convert(mode), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "taken at home"
    picture.save(buffer, "JPEG", exif=exif, comment=b"private", icc_profile=b"profile", **options)
    return buffer.getvalue()


def sent(encoder: ImageEncoder, file: bytes, **options: Any) -> bytes:
    url = encoder.encode(decode_image(file).pixels, file, **options).url
    return base64.b64decode(url.partition(",")[2])


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"mode": "L"}, {"subsampling": 0, "quality": 95}]
)
def test_a_jpeg_travels_without_its_notes_and_with_all_of_its_pixels(options: dict[str, Any]) -> None:
    file = jpeg(**options)
    bare = sent(ImageEncoder(), file + b"a film follows")
    assert len(bare) < len(file)
    for note in (b"Exif", b"taken at home", b"private", b"profile", b"film"):
        assert note not in bare
    assert (decode_image(bare).pixels == decode_image(file).pixels).all()


def test_what_is_encoded_anew() -> None:
    file = jpeg()
    pixels = decode_image(file).pixels
    assert sent(ImageEncoder("png"), file).startswith(b"\x89PNG")
    assert decode_image(sent(ImageEncoder(longest_side=30), file)).pixels.shape == (20, 30, 3)
    assert sent(ImageEncoder(longest_side=60), file) == bare_jpeg(file)
    turned = jpeg(orientation=6)
    assert decode_image(sent(ImageEncoder(), turned)).pixels.shape == (60, 40, 3)
    assert b"Exif" not in sent(ImageEncoder(), turned)
    as_it_lies = decode_image(turned, apply_orientation=False).pixels
    kept = ImageEncoder().encode(as_it_lies, turned, apply_orientation=False).url
    assert base64.b64decode(kept.partition(",")[2]) == bare_jpeg(turned)
    assert ImageEncoder().encode(pixels).url == ImageEncoder().encode(pixels, b"\x89PNG").url


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 20, 100, 300, 600, 1000, -1, -2])
def test_a_damaged_file_is_encoded_anew_or_is_whole(cut: int) -> None:
    assert bare_jpeg(jpeg()[:cut]) is None
    assert bare_jpeg(jpeg(mode="CMYK")) is None


def test_files_with_random_damage_never_raise() -> None:
    rng = np.random.default_rng(1)
    file = jpeg(size=(16, 16))
    for _ in range(300):
        broken = bytearray(file)
        for place in rng.integers(2, len(file), 3):
            broken[place] = rng.integers(0, 256)
        bare_jpeg(bytes(broken))


def test_the_file_travels_through_the_captioner() -> None:
    file = jpeg()
    with running() as server:
        captioner = open_captioner(settings_for(server))
        assert isinstance(captioner, HttpCaptioner)
        prepared = captioner.prepare_file(decode_image(file).pixels, file)
        list(captioner.caption([CaptionRequest(0, "what", (prepared,))]))
        captioner.close()
    assert server.asked[0].image == bare_jpeg(file)


OURS = {"id": "m", "owned_by": OUR_SERVER, "digest": "0123456789abcdef" * 2, "parallel": 7}


def test_our_own_server_is_told_what_else_decides_a_caption() -> None:
    rule = RepetitionRule(5, 3, 9)
    with running(models={"data": [OURS]}) as server:
        run(server, sampling=SamplingParams(repetition=rule), prompts=2)
        assert server.asked[0].body["repetition"] == {"max_period": 5, "min_repeats": 3, "min_tokens": 9}
        assert server.asked[0].body["siblings"] == 2
        run(server, prompt="see <image> there")
        assert server.asked[-1].body["repetition"] is None
        assert "siblings" not in server.asked[-1].body
        assert [part["type"] for part in server.asked[-1].content] == ["image_url", "text"]
        assert server.asked[-1].text == "see <image> there"  # as it was written, line ends too


def test_loops_are_our_servers_business() -> None:
    words = "a b " * 20
    answers = {"choices": [{"message": {"content": words}, "finish_reason": "stop"}], "usage": {}}
    sampling = SamplingParams(repetition=RepetitionRule())
    with running(models={"data": [OURS]}, answer=lambda asked: answers) as ours:
        [whole] = run(ours, sampling=sampling)
    with running(answer=lambda asked: answers) as other:
        [cut] = run(other, sampling=sampling)
    assert whole.text == words.strip()
    assert len(cut.text) < len(whole.text)


def test_a_server_says_how_many_requests_fill_it() -> None:
    with running(models={"data": [OURS]}, delay_s=0.02) as server:
        captioner = open_captioner(settings_for(server))
        assert captioner.stats()["limit"] == 7
        captioner.close()
        run(server, 3, batch_size=4)
    for odd in (0, -1, "7", None, 2.5):
        with running(models={"data": [{**OURS, "parallel": odd}]}) as server:
            captioner = open_captioner(settings_for(server))
            assert captioner.stats()["limit"] == 4
            captioner.close()


def test_among_several_servers_all_must_be_ours() -> None:
    ours, other = ServedModel("m", "d", True), ServedModel("m")
    assert choose_model({"a": [ours], "b": [ours]}, "m").is_ours
    assert not choose_model({"a": [ours], "b": [other]}, "m").is_ours
    assert not choose_model({"a": [ours], "b": None}, "m").is_ours


def test_many_requests_reuse_few_connections() -> None:
    with running() as server:
        captions = run(server, 30, batch_size=3)
        assert len(server._connections) <= 4
    assert len({caption.text for caption in captions}) == 30
    assert image(0).shape == (20, 30, 3)
