"""A package of somebody else's, with the chapter's model in it: textgen.load finds it by its entry point, and so does the command line."""
import json, os, subprocess, sys

import pytest

import textgen
from textgen.core import UsageError, registered
from textgen.testing import GeneratorTests, run_tests

from .example import example, sentences, source


def install(folder, name="markov_textgen"):
    "What pip leaves behind of a package: its module, and what it says of itself."
    about = folder/f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (folder/f"{name}.py").write_text(source(), encoding="utf-8")
    (about/"METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about/"entry_points.txt").write_text(f"[textgen.generators]\nmarkov = {name}:Markov\n")
    return folder


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    "A folder with the package, on the path, and one with a model of its kind."
    folder, model = install(tmp_path_factory.mktemp("site")), tmp_path_factory.mktemp("models")/"markov"
    example().train(sentences()).save(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        TestPlugin.folder = model
        yield folder, model
    sys.modules.pop("markov_textgen", None)


@pytest.mark.usefixtures("plugin")
class TestPlugin(GeneratorTests):
    prompts, folder = ["One day ", "The", "a"], None
    def make(self): return textgen.load(self.folder)

    def test_where_it_comes_from(self):
        assert type(self.model).__module__ == "markov_textgen" and registered("generators")["markov"] == "markov_textgen:Markov"


def test_the_command_line_writes_with_it(plugin):
    folder, model = plugin
    words = ["generate", "--model", str(model), "--prompt", "One day", "--seed", "3", "--max-new-tokens", "30", "--temperature", "0.7"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    run = lambda *more: subprocess.run([sys.executable, "-c", "import sys; from textgen.cli import main; sys.exit(main())", *words, *more],
                                       env=env, capture_output=True, text=True)
    text = textgen.load(model).generate("One day", seed=3, max_new_tokens=30, temperature=0.7)[0].text
    done = run()
    assert (done.returncode, done.stdout) == (0, f"One day{text}".removesuffix("\n") + "\n"), done.stderr
    done = run("--top-k", "3")
    assert done.returncode == 2 and "top_k: Markov cannot do this" in done.stderr


def test_without_the_package_its_models_are_unknown(tmp_path):
    example().train("abc\n").save(tmp_path/"model")
    (tmp_path/"model/config.json").write_text(json.dumps({"model_type": "markov-of-nobody"}))
    with pytest.raises(UsageError, match="no model of type 'markov-of-nobody' is known here"): textgen.load(tmp_path/"model")


def test_a_package_whose_model_is_broken_is_found_out(plugin):
    class Broken(GeneratorTests):
        prompts = TestPlugin.prompts
        def make(self):
            model = textgen.load(TestPlugin.folder)
            model.nll = lambda texts: [0.0 for _ in texts]
            return model
    assert "test_logprobs_add_up_to_nll" in {one.test for one in run_tests(Broken) if one.outcome == "failed"}
