"""Type-one errors of the claims' tests: the benchmark that measures them, with fewer studies."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "studies" / "null_claims.py"
STUDIES = 40


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("null_claims", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
@pytest.mark.parametrize("at_margins", [False, True])
def test_null_studies_are_rarely_called_anything(script, at_margins):
    """Each test decides something in no more studies than chance allows at 5%, and all together at 5%."""
    tally = script.simulate(range(43, 48), STUDIES, at_margins=at_margins)
    most = stats.binom.ppf(1 - 1e-4 / len(tally), STUDIES, 0.05)

    assert len(tally) == (9 if at_margins else 37)
    assert all(sum(decided) <= most for decided in tally.values()), script.table({5: tally})
    rates = [np.mean(decided) for decided in tally.values()]
    # tests of one study depend on each other: as if every study were one test
    assert np.mean(rates) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES) / 2


def test_what_was_done_before_would_be_caught(script):
    assert script.by_other_seeds(5, 4000) > 0.12
    assert script.by_other_seeds(20, 4000) > 0.22
    assert script.by_the_baseline(5, 10) > 0.5
