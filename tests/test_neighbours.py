import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from support import neighbours


def unit_features(count, size=6, seed=0):
    values = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=1)


@pytest.fixture(params=[None, 1, 300], ids=["at once", "one by one", "in parts"])
def pairs(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(neighbours, "PAIRS", request.param)


@pytest.mark.usefixtures("pairs")
def test_neighbours_in_a_bank_are_scikit_learns():
    queries, bank = unit_features(40) * 3, unit_features(70, seed=1)
    values, index = neighbours.find_nearest(queries, bank, 5)
    search = NearestNeighbors(n_neighbors=5, metric="cosine").fit(bank.numpy())
    distance, expected = search.kneighbors(queries.numpy())
    assert np.array_equal(index.numpy(), expected)
    np.testing.assert_allclose(values.numpy(), 1 - distance, atol=1e-5)


@pytest.mark.usefixtures("pairs")
def test_nobody_is_its_own_neighbour():
    features = unit_features(70)
    values, index = neighbours.find_nearest(features, features, 4)
    search = NearestNeighbors(n_neighbors=4, metric="cosine").fit(features.numpy())
    distance, expected = search.kneighbors()  # without a query: of each among the others
    assert np.array_equal(index.numpy(), expected)
    np.testing.assert_allclose(values.numpy(), 1 - distance, atol=1e-5)


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 0)), (3, (3, 2))])
def test_there_are_no_more_neighbours_than_others(count, shape):
    features = unit_features(count)
    values, index = neighbours.find_nearest(features, features, 5)
    assert values.shape == index.shape == shape
    assert neighbours.find_nearest(features, unit_features(4), 5)[1].shape == (count, 4)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("threshold", [0.9, 0.999, 1.0])
def test_original_is_the_first_that_is_so_similar(threshold):
    features = unit_features(60, size=3).repeat(2, 1)
    features[::7] += 0.01
    features = torch.nn.functional.normalize(features, dim=1)
    values, _ = neighbours.find_nearest(features, features, 1)
    found = neighbours.find_originals(features, threshold, values[:, 0])
    exact = features.numpy().astype(float)
    for i in range(len(features)):
        alike = [j for j in range(i) if exact[i] @ exact[j] >= threshold - 1e-5]
        assert found[i] == (alike[0] if alike else -1)
    assert 0 < (found >= 0).sum() < len(found)
