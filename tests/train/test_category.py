"""One label per class: from a refinery and from WordNet."""

import json
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from data.loader import open_loader
from train import TrainError
from train.labels.category import Category, read_is_a, taxonomy_table, visual_similarity, wu_palmer
from train.labels.refinery import Refinery

LABELS = Path(__file__).parents[3] / "shared/data/labels"
IMAGENET = models.normalisation("resnet18")
CPU = torch.device("cpu")


@st.composite
def hierarchies(draw):
    """A directed acyclic graph: each node may have several parents among those before it."""
    n = draw(st.integers(2, 12))
    return {
        str(i): [str(p) for p in draw(st.sets(st.integers(0, i - 1), min_size=1, max_size=3))]
        for i in range(1, n)
        if draw(st.integers(0, 9))
    }


@given(hierarchies())
def test_wu_palmer_agrees_with_a_graph_library(parents):
    graph = networkx.DiGraph([(parent, child) for child, several in parents.items() for parent in several])
    names = sorted(graph)
    if not names:
        return
    depth = {
        node: len(networkx.dag_longest_path(graph.subgraph({node} | networkx.ancestors(graph, node)))) for node in graph
    }
    ours = wu_palmer(parents, names, Path("is_a"))
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            common = ({a} | networkx.ancestors(graph, a)) & ({b} | networkx.ancestors(graph, b))
            deepest = max((depth[node] for node in common), default=0)
            assert ours[i, j] == pytest.approx(2 * deepest / (depth[a] + depth[b]))
            assert (ours[i, j] == 1) == (a == b)


def test_laws_of_the_taxonomy(tmp_path):
    (tmp_path / "is_a.txt").write_text("thing animal\nthing plant\nanimal dog\nanimal cat\nplant oak\n")
    names = ["dog", "cat", "oak"]
    similarity = wu_palmer(read_is_a(tmp_path / "is_a.txt"), names, tmp_path)
    np.testing.assert_allclose(similarity, [[1, 2 / 3, 1 / 3], [2 / 3, 1, 1 / 3], [1 / 3, 1 / 3, 1]])
    table = taxonomy_table(tmp_path / "is_a.txt", tuple(names))
    torch.testing.assert_close(table.sum(1), torch.ones(3))
    assert table.argmax(1).tolist() == [0, 1, 2]
    assert table[0, 1] > table[0, 2]


def test_bad_hierarchies_are_refused(tmp_path):
    with pytest.raises(TrainError, match=r"absent.txt: cannot be read"):
        taxonomy_table(tmp_path / "absent.txt", ("a",))
    (tmp_path / "words.txt").write_text("thing animal\nanimal\n")
    with pytest.raises(TrainError, match=r'words.txt:2: expected two words, "parent child"'):
        taxonomy_table(tmp_path / "words.txt", ("animal",))
    (tmp_path / "small.txt").write_text("thing animal\n")
    with pytest.raises(TrainError, match=r"lacks 4 of the 5 classes, a, b, c, \.\.\.; its nodes must be named as"):
        taxonomy_table(tmp_path / "small.txt", ("animal", "a", "b", "c", "d"))
    (tmp_path / "circle.txt").write_text("a b\nb c\nc a\n")
    with pytest.raises(TrainError, match="is its own ancestor"):
        taxonomy_table(tmp_path / "circle.txt", ("a", "b"))


@pytest.mark.skipif(not LABELS.is_dir(), reason="needs WordNet's is-a relation")
def test_the_thousand_classes_of_imagenet():
    classes = [row[1] for row in json.loads((LABELS / "imagenet_classes.json").read_text())]
    table = taxonomy_table(LABELS / "wordnet.is_a.txt", tuple(classes))
    assert table.argmax(1).tolist() == list(range(1000))
    assert 0.05 < table.diagonal().mean() < 0.2
    names = {row[1]: row[2] for row in json.loads((LABELS / "imagenet_classes.json").read_text())}
    persian = classes.index("n02123394")
    nearest = table[persian].argsort(descending=True)[1:4].tolist()
    assert all("cat" in str(names[classes[i]]).lower() for i in nearest)


def test_a_class_label_is_the_mean_of_its_images(converted):
    torch.manual_seed(0)
    network = models.build("resnet18", 3)
    refinery = Refinery(network, IMAGENET, bn="running")
    loader = open_loader(converted.beton("train"), resolution=32, batch_size=7, train=False, decoder="ffcv")
    table = visual_similarity(refinery, loader, device=CPU, autocast=None)
    said = [[], [], []]
    for batch in loader.epoch(0):
        for label, logits in zip(batch.labels.tolist(), refinery(batch).logits, strict=True):
            said[label].append(logits.softmax(0))
    torch.testing.assert_close(table, torch.stack([torch.stack(rows).mean(0) for rows in said]), rtol=1e-4, atol=1e-6)
    targets = Category(table)(next(iter(loader.epoch(0))))
    assert torch.equal(targets.probabilities, table[next(iter(loader.epoch(0))).labels])
