from pathlib import Path

import pytest

from vila2.config import RecaptionSettings, make_settings, recaption_settings
from vila2.errors import UsageError
from vila2.types import RepetitionRule

BASE = {"source": "s", "model": "m", "out": "o"}


def make(**values: object) -> RecaptionSettings:
    return make_settings(RecaptionSettings, {**BASE, **values})


def test_the_ladder_starts_with_what_was_asked_and_then_the_retries() -> None:
    settings = make(top_k=5, seed=9)
    ladder = [settings.sampling(attempt) for attempt in range(1 + len(settings.retry))]
    assert [(s.temperature, s.top_p) for s in ladder] == [(0.0, 1.0), (0.4, 0.9), (0.8, 0.95)]
    assert {(s.top_k, s.seed, s.max_new_tokens) for s in ladder} == {(5, 9, 256)}
    assert ladder[0].repetition == RepetitionRule()


def test_loops_are_not_cut_where_the_length_is_the_point() -> None:
    assert make(ignore_eos=True).sampling().repetition is None
    assert make(repetition=None).sampling().repetition is None


def test_what_decides_captions_is_recorded_and_what_does_not_is_not() -> None:
    deciding = make().deciding()
    for name in ("seed", "temperature", "precision", "retry", "truncation", "max_pixels", "stop", "template"):
        assert name in deciding
    for name in ("batch_size", "threads", "limit", "rank", "world_size", "out", "dry_run", "rows_per_part"):
        assert name not in deciding
    assert make().deciding() == make(batch_size=3, limit=2, precision="bf16").deciding()
    assert make().deciding() != make(seed=1).deciding()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temprature": 1}, ["unknown key 'temprature'", "'temperature'"]),
        ({"retry": [{"temp": 1}]}, ["retry.0.temp", "'temperature'"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "greater than or equal to 1", "got 0"]),
        ({"min_new_tokens": 300}, ["min_new_tokens 300", "256"]),
        ({"rank": 2, "world_size": 2}, ["rank 2", "world_size 2"]),
        ({"backend": "trtllm", "precision": "int8"}, ["int8", "trtllm", "bf16, fp8 or int4"]),
        ({"backend": "vllm"}, ["vllm", "native"]),
        ({"backend": "http"}, ["needs --base-url"]),
        ({"backend": "http", "base_url": "u", "template": "plain"}, ["template", "--backend http", "native"]),
        ({"backend": "http", "base_url": "u", "precision": "bf16"}, ["precision", "--backend http"]),
        ({"backend": "http", "base_url": "u", "gpu_memory": 0.5}, ["gpu_memory", "only to native"]),
        ({"backend": "trtllm", "gpu_memory": 0.5}, ["gpu_memory", "--backend trtllm"]),
        ({"base_url": ["u"]}, ["base_url", "--backend native", "http"]),
        ({"prompt": ["a"], "prompt_text": "b"}, ["not both"]),
        ({"prompt": ["a", "a"]}, ["twice"]),
        ({"device": "tpu"}, ["device", "'cpu'", "'tpu'"]),
        ({"source": " "}, ["source"]),
        ({"top_p": 0}, ["top_p"]),
        ({"stop": [""]}, ["stop"]),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        make(**values)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (
            "r.toml",
            'model = "m"\nseed = 3\nmax_new_tokens = 9\nprompt = ["brief"]\n[[retry]]\ntemperature = 1.0\n',
        ),
        ("r.yaml", "model: m\nseed: 3\nmax_new_tokens: 9\nprompt: [brief]\nretry: [{temperature: 1.0}]\n"),
    ],
)
def test_the_command_line_overrides_the_recipe(tmp_path: Path, name: str, body: str) -> None:
    recipe = tmp_path / name
    recipe.write_text(body)
    settings = recaption_settings(recipe, {"source": "s", "out": "o", "seed": 5, "top_k": None})
    assert (settings.model, settings.seed, settings.max_new_tokens) == ("m", 5, 9)
    assert [(r.temperature, r.top_p) for r in settings.retry] == [(1.0, 0.95)]
    replaced = recaption_settings(recipe, {"source": "s", "out": "o", "prompt_text": "Hi"})
    assert (replaced.prompt, replaced.prompt_text) == ((), "Hi")


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("r.toml", "sede = 1", ["'sede'", "'seed'"]),
        ("r.toml", "seed = = 1", ["line 1"]),
        ("r.yaml", "a: [", ["line"]),
        ("r.yaml", "- 1", ["name = value"]),
        ("r.yaml", "seed: !!python/object/apply:os.getcwd []", ["could not determine a constructor"]),
        ("r.json", "{}", [".toml"]),
        ("gone.toml", None, ["cannot read", "No such file"]),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_file(
    tmp_path: Path, name: str, body: str | None, words: list[str]
) -> None:
    recipe = tmp_path / name
    if body is not None:
        recipe.write_text(body)
    with pytest.raises(UsageError) as caught:
        recaption_settings(recipe, BASE)
    message = str(caught.value)
    assert str(recipe) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="missing out"):
        recaption_settings(None, {"source": "s"})


def test_one_name_needs_no_list() -> None:
    settings = make(prompt="brief", stop="\n")
    assert (settings.prompt, settings.stop) == (("brief",), ("\n",))


def engine(path: Path, text: str) -> str:
    path.mkdir()
    (path / "engine.json").write_text(text)
    return str(path)


def test_an_engine_directory_says_which_backend_it_is_for(tmp_path: Path) -> None:
    ours = engine(tmp_path / "ours", '{"backend": "native", "precision": "int8"}')
    theirs = engine(tmp_path / "theirs", '{"backend": "trtllm", "precision": "fp8"}')
    native = recaption_settings(None, {"source": "s", "out": "o", "engine": ours})
    assert (native.backend, native.model, native.engine) == ("native", ours, None)
    assert native.resolved_precision == "int8"
    assert native == recaption_settings(None, {"source": "s", "out": "o", "model": ours, "backend": "native"})
    foreign = recaption_settings(None, {"source": "s", "out": "o", "engine": theirs})
    assert (foreign.backend, foreign.engine, foreign.resolved_precision) == ("trtllm", theirs, "fp8")
    for settings in (native, foreign):  # as a process of `--devices` gets them
        assert make_settings(RecaptionSettings, settings.model_dump(mode="json", by_alias=True)) == settings
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('source = "s"\nout = "o"\nmodel = "m"\n')
    assert (
        recaption_settings(recipe, {"engine": ours}).model == ours
    )  # the command line's instead of the recipe's
    recipe.write_text(f'source = "s"\nout = "o"\nengine = "{theirs}"\n')
    assert recaption_settings(recipe, {}).engine == theirs
    assert recaption_settings(recipe, {"model": "m"}).engine is None


def test_what_is_no_engine_or_another_backends_is_refused(tmp_path: Path) -> None:
    ours = engine(tmp_path / "ours", '{"backend": "native", "precision": "int8"}')
    for values, words in (
        ({"engine": str(tmp_path)}, r"is none of `vila2-fast build`: it has no readable engine\.json"),
        ({"engine": engine(tmp_path / "b", "{")}, "no readable engine.json"),
        ({"engine": engine(tmp_path / "c", '{"backend": "vllm"}')}, "no readable engine.json"),
        ({"engine": engine(tmp_path / "d", '{"backend": 3}')}, "no readable engine.json"),
        ({"engine": ours, "backend": "trtllm"}, "is for --backend native, not trtllm"),
        ({"engine": ours, "model": "m"}, "give model or engine, not both"),
        ({"engine": ours, "backend": "http", "base_url": "u"}, "engine means nothing to --backend http"),
        ({"engine": ours, "engine_option": "a=b"}, "engine_option means nothing to --backend native"),
    ):
        with pytest.raises(UsageError, match=words) as refused:
            recaption_settings(None, {"source": "s", "out": "o", **values})
        assert "\n" not in str(refused.value)
