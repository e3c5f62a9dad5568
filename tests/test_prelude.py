"""--prelude: functions of one's own in the sandbox and in the prompt."""

import pytest
from PIL import Image

import evaluate
import train
from data import DataError, Sample
from engine.prelude import named_in_prompt, read_prelude
from engine.prompt import messages
from model import tiny_policy
from rollout import Limits, Recital, rollout
from sandbox import Sandbox, SandboxError

TOOLS = '''"""Tools of a student."""
import numpy as np

print("no word of this is shown")
LIMIT = 3

def zoom(image, box, factor: int = 4):
    """Crop a box and enlarge it.

    More than the first line is not named.
    """
    part = _crop(image, box)
    return part.resize((part.width * factor, part.height * factor))

def _crop(image, box):
    return image.crop(box)

class Ruler:
    pass
'''
NAMED = """
The session also holds:
zoom(image, box, factor: int=4): Crop a box and enlarge it.
Ruler"""


@pytest.fixture
def tools(tmp_path):
    path = tmp_path / "tools.py"
    path.write_text(TOOLS)
    return str(path)


def text_of(chat):
    return "".join(part.get("text", "") for part in chat[-1]["content"])


def sample(**fields):
    return Sample("q", "What is it?", "red", images=(Image.new("RGB", (60, 40)),), **fields)


# ----------------------------------------------------------------------------------- in the sandbox
def test_the_code_can_call_the_functions(tools):
    with Sandbox([Image.new("RGB", (60, 40))], prelude=tools) as sandbox:
        first = sandbox.run("zoom(image_clue_0, (0, 0, 10, 20)).show()")
        assert first.error is None and first.text == ""
        assert [image.size for image in first.images] == [(40, 80)]
        second = sandbox.run("print(image_clue_1.size, LIMIT)")  # the first figure has its number
        assert second.text.strip() == "(40, 80) 3"


def test_they_are_there_again_after_a_restart(tools):
    with Sandbox(prelude=tools) as sandbox:
        sandbox.run("LIMIT = 9")
        assert sandbox.run("import os; os._exit(1)").error
        again = sandbox.run("print(LIMIT, zoom.__name__)")
        assert again.error is None and again.text.strip().endswith("3 zoom")


def test_the_file_does_not_move_the_random_numbers_of_the_code(tmp_path, tools):
    random = tmp_path / "random_tools.py"
    random.write_text("import random\nrandom.random()\ndef f(): pass\n")
    drawn = []
    for prelude in ("", tools, str(random)):
        with Sandbox(seed=5, prelude=prelude) as sandbox:
            drawn.append(sandbox.run("import random\nprint(random.random())").text)
    assert len(set(drawn)) == 1


def test_the_file_is_confined_as_all_code_is(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    reader = tmp_path / "reader.py"
    secret = str(tmp_path / "secret.txt")
    reader.write_text(f"def read():\n    return open({secret!r}).read()\n")
    with Sandbox(prelude=str(reader)) as sandbox:
        assert "secret" not in sandbox.run("print(read())").text.replace(secret, "")


@pytest.mark.parametrize("line", ["import no_such_module", "1 / 0", "raise SystemExit('no')"])
def test_a_file_that_raises_is_one_line(tmp_path, line):
    broken = tmp_path / "broken.py"
    broken.write_text(f"def f(): pass\n{line}\n")
    with pytest.raises(SandboxError) as stopped:
        Sandbox(prelude=str(broken))
    message = str(stopped.value)
    assert "\n" not in message and len(message) <= 300 and "prelude" in message


# ------------------------------------------------------------------------------------ in the prompt
def test_the_prompt_names_them_with_the_first_line_of_their_documentation(tools):
    assert named_in_prompt(tools) == NAMED
    assert named_in_prompt("") == ""
    own = [{"role": "user", "content": "Look: <image>"}]
    for asked in (sample(), sample(prompt=own)):
        assert text_of(messages(asked, prelude=tools)).endswith(NAMED)
    templates = {"image": "{query}"}
    assert text_of(messages(sample(), templates, prelude=tools)).endswith("What is it?" + NAMED)


def test_they_are_not_named_where_there_is_no_tool(tools):
    assert "zoom" not in text_of(messages(sample(), tools=False, prelude=tools))
    assert "zoom" not in text_of(messages(sample()))


def test_words_of_the_file_are_text_in_the_prompt(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text('def f():\n    """Takes an <image> and {query}."""\n')
    chat = messages(sample(), prelude=str(path))
    assert text_of(chat).endswith("f(): Takes an <image> and {query}.")
    assert sum(part["type"] == "image" for part in chat[-1]["content"]) == 1


def test_a_rollout_shows_and_runs_them(tools, tmp_path):
    look = "<code>\n```python\nzoom(image_clue_0, (0, 0, 10, 10), 2).show()\n```\n</code>"
    answer = "<answer>\n\\boxed{red}\n</answer>"
    policy = Recital(tiny_policy(tmp_path / "tiny", [look, answer] * 20))
    limits = Limits(max_context=4000, prelude=tools)
    ((t,),) = rollout(policy, [sample(turns=[look, answer])], 1, limits)
    assert t.turns[0].error is None and [i.size for i in t.turns[0].images] == [(20, 20)]
    prompt = policy.tokenizer.decode(t.tokens[: t.prompt_length])
    assert "zoom(image, box, factor: int=4)" in prompt


# ---------------------------------------------------------------------------------- what is no file
BAD = {
    "nowhere.py": None,
    "folder.py": "folder",
    "syntax.py": "def f(:\n    pass\n",
    "nulls.py": "def f(): pass\0",
    "latin.py": b"def f(): return '\xe9'",
    "empty.py": "",
    "constants.py": "import numpy\nX = 1\n",
    "hidden.py": "def _f(): pass\n",
    "inside.py": "if True:\n    def f(): pass\n",
    "deep.py": "(" * 10_000,
}


@pytest.fixture(params=BAD)
def bad(request, tmp_path):
    path = tmp_path / request.param
    content = BAD[request.param]
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    return path


def test_a_file_that_is_no_prelude_is_an_error_of_one_line(bad):
    with pytest.raises(DataError) as stopped:
        read_prelude(str(bad))
    message = str(stopped.value)
    assert bad.name in message and "--prelude" in message
    assert "\n" not in message and len(message) <= 300


@pytest.mark.parametrize("script", [train, evaluate])
def test_both_scripts_end_with_exit_code_2_before_a_model_is_loaded(
    script, bad, tmp_path, monkeypatch, capsys
):
    words = ["--prelude", str(bad), "--out", str(tmp_path / "out"), "--model", str(tmp_path)]
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    monkeypatch.setattr("sys.argv", ["script.py", *words])
    monkeypatch.setattr(script, "load_policy", None)
    with pytest.raises(SystemExit) as stopped:
        script.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and bad.name in error
