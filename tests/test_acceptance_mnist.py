"""NICE on MNIST. A full-covariance Gaussian scores 1471 nats; above 2300 the dequantisation noise is missing."""

import pytest
import torch

from pyflowgen.data import DataError, Dataset, mnist
from pyflowgen.models import NICE
from pyflowgen.recipes import recipe
from pyflowgen.train import TrainConfig, choose_path, evaluate, fit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data():
    try:
        return mnist()
    except DataError as error:
        pytest.skip(f"MNIST IS MISSING, NICE WAS NOT JUDGED ON IT: {error}")


@pytest.mark.parametrize("path", ["fused", "reference"])
def test_nice_reaches_its_level(data, path):
    chosen = recipe("nice")
    config = chosen.config(data, path=path)
    assert config.time_limit is not None and config.time_limit <= 240
    torch.manual_seed(config.seed)
    model = chosen.build(data)
    assert (
        model.config["couplings"] == 4 and model.config["hidden"] == [300] * 3 and model.config["prior"] == "logistic"
    )
    result = fit(model, data, config)
    with choose_path(path):
        found = evaluate(model, data, data.test, draws=2)
    print(f"NICE on MNIST, {path}: {found}, {result}")
    assert 1600 <= found["nats"] <= 2300


def test_log_determinant_is_that_of_the_jacobian(data):
    """On 64 pixels of the middle, where a Jacobian can be had, after some training."""
    middle = [t.view(-1, 28, 28)[:, 10:18, 10:18].flatten(1) for t in (data.train, data.valid, data.test)]
    small = Dataset("middle", *middle, levels=256)
    model = NICE(64, hidden=(100,) * 2)
    fit(model, small, TrainConfig(epochs=1, batch=500))
    x = small.dequantize(small.test[:8], torch.Generator().manual_seed(0))
    _, logdet = model.bijection(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.bijection(x)[0].sum(0), x).movedim(1, 0)
    expected = torch.linalg.slogdet(jacobian.double())[1]
    assert ((expected - logdet).abs() <= 1e-4 * expected.abs().clamp_min(1)).all()
