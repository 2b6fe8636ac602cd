"""The classifier on the features that a bundle carries, against the module it is taken from."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rlsd.export.bundle import BundleWriter  # noqa: E402
from rlsd.export.extractors import Penultimate, class_head, load_features  # noqa: E402
from rlsd.export.package import write_class_head  # noqa: E402
from rlsd.models.fashion.classifier import Classifier  # noqa: E402


def small(folder, classes=3):
    torch.manual_seed(0)
    model = Classifier((4, 8), classes, groups=2).eval()
    model.save_pretrained(folder)
    return model


def test_the_head_on_the_features_gives_the_logits(tmp_path):
    model = small(tmp_path / "features")
    phi = load_features(tmp_path / "features", (1, 16, 16))
    head, names = class_head(phi, ["a", "b", "c"])
    with BundleWriter(tmp_path / "bundle", "x", "p", "cpu", "fp32") as bundle:
        write_class_head(head, names, 8, bundle)
    assert "info class_head class_head.f32 a b c" in (tmp_path / "bundle" / "manifest.txt").read_text().splitlines()
    values = np.fromfile(tmp_path / "bundle" / "class_head.f32", "<f4").reshape(3, 9)
    image = torch.rand(5, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        features, logits = phi(image).numpy(), model(image).numpy()
    np.testing.assert_allclose(features @ values[:, :-1].T + values[:, -1], logits, rtol=1e-4, atol=1e-5)


def test_classes_are_the_contexts_where_there_are_as_many(tmp_path):
    phi = Penultimate(small(tmp_path / "features", classes=2))
    assert class_head(phi, ["cat", "dog"])[1] == ["cat", "dog"]
    assert class_head(phi, ["cat"])[1] == ["class-0", "class-1"]
    assert class_head(torch.nn.Flatten(), ["cat", "dog"]) == (None, [])


@pytest.mark.parametrize(
    "head, names, why",
    [((2, 9), ["a"], "at least 2"), ((2, 8), ["a", "b"], "row of 9"), ((2, 9), ["a", "a"], "different"),
     ((2, 9), ["a", "b c"], "class 'b c' is not allowed")],
)  # fmt: skip
def test_a_head_that_does_not_fit(tmp_path, head, names, why):
    writer = BundleWriter(tmp_path / "bundle", "x", "p", "cpu", "fp32")
    with pytest.raises(ValueError, match=why), writer as bundle:
        write_class_head(torch.zeros(head), names, 8, bundle)
