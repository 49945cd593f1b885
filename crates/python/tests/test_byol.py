"""The package from a user's view."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, pictures

import byol

NOTEBOOK = Path(__file__).parents[3] / "docs/tutorial/python.ipynb"
in_repository = pytest.mark.skipif(not NOTEBOOK.exists(), reason="the notebook is in the repository only")


def test_data_set_of_arrays_has_their_images_and_labels(data):
    images, labels = pictures()
    assert len(data) == 60 and data.splits == {"train": 60} and data.classes == ["0", "1"]
    assert np.array_equal(data.image(3), images[3])
    assert data.labels().tolist() == labels
    assert data.labels().dtype == np.int64
    for i in (60, -1):
        with pytest.raises(IndexError, match=f"image {i}"):
            data.image(i)
    with pytest.raises(byol.DataError, match="no test split"):
        data.names("test")


def test_sizes_of_images_may_differ_and_generators_work():
    images = (np.zeros((10 + i, 12, 3), np.uint8) for i in range(3))
    data = byol.Dataset.from_arrays(images)
    assert [data.image(i).shape[0] for i in range(3)] == [10, 11, 12]
    assert data.labels() is None and data.classes == []


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([], None, "no images"),
        (np.zeros((2, 8, 8, 3), np.float32), None, "float32 is not an image"),
        (np.zeros((2, 8, 8, 65), np.uint8), None, r"\[8, 8, 65\] is not an image"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0], "1 labels for 2 images"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, -1], "negative"),
        ([np.zeros(5, np.uint8)], None, r"shape \[5\]"),
    ],
)
def test_unusable_images_are_refused(images, labels, message):
    with pytest.raises(byol.DataError, match=message):
        byol.Dataset.from_arrays(images, labels)


def test_images_of_four_channels_with_16_bits(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 65536, (60, 20, 24, 4)).astype(np.uint16)
    data = byol.Dataset.from_arrays(images, [i % 2 for i in range(60)])
    assert data.image(3).shape == (20, 24, 4)
    run = byol.pretrain(data, tmp_path / "run", **SMALL)
    features = run.encoder.embed(images[:3])
    assert features.shape[0] == 3 and np.isfinite(features).all()
    assert run.encoder.preprocess(images[0]).shape[0] == 4
    for photo in (np.zeros((20, 24, 3), np.uint8), images[0][..., :2]):
        with pytest.raises(byol.DataError, match="but the encoder was trained on 4"):
            run.encoder.embed(photo)
        with pytest.raises(byol.DataError, match="but the encoder was trained on 4"):
            run.encoder.preprocess(photo)
    # Files with the same values.
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", images[i])
    assert np.allclose(run.encoder.embed([tmp_path / "2.npy"]), features[2], atol=1e-5)
    assert run.encoder.export(tmp_path / "encoder.onnx") < 1e-3
    with pytest.raises(byol.DataError, match="trained on 4"):
        run.encoder.embed([images[0], np.zeros((20, 24, 3), np.uint8)])
    opened = byol.Dataset.open(tmp_path, channels=[4, 1])
    assert opened.image(0).shape == (20, 24, 2)
    with pytest.raises(byol.DataError, match="of 4 and of 3 channels"):
        byol.Dataset.from_arrays([images[0], np.zeros((8, 8, 3), np.uint8)])
    lazy = byol.Dataset.from_sequence(images)
    assert byol.pretrain(lazy, tmp_path / "lazy", **SMALL).encoder.embed(images[:1]).shape[0] == 1
    # The ranges of files apply to arrays, too; gray stays gray for an encoder of one channel.
    folder = tmp_path / "gray"
    folder.mkdir()
    for i in range(40):
        np.save(folder / f"{i}.npy", 500 + images[i, :, :, :1] // 100)
    data = byol.Dataset.open(folder, channels="all")
    gray = byol.pretrain(data, tmp_path / "gray-run", **SMALL).encoder
    array = np.load(folder / "3.npy")
    assert np.array_equal(gray.embed(array), gray.embed(folder / "3.npy"))
    assert np.array_equal(gray.embed(array[:, :, 0]), gray.embed(array))


class Photos:
    """Pictures as a torchvision data set returns them; counts what is read."""

    def __init__(self, n=60):
        self.images, self.labels = pictures()
        self.n, self.reads = n, 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads += 1
        return self.images[i], self.labels[i]


def test_sequences_are_read_when_needed_and_train_as_arrays_do(run, encoder, tmp_path):
    photos = Photos()
    data = byol.Dataset.from_sequence(photos, photos.labels)
    assert len(data) == 60 and data.classes == ["0", "1"] and photos.reads == 0
    assert np.array_equal(data.image(3), photos.images[3]) and photos.reads == 1
    same = byol.pretrain(data, tmp_path / "run", **SMALL)
    assert np.array_equal(same.encoder.embed(photos.images), run.encoder.embed(photos.images))
    assert np.array_equal(encoder.embed(data), encoder.embed(photos.images))
    accuracy = byol.evaluate.knn(encoder, data).accuracy
    assert accuracy == byol.evaluate.knn(encoder, byol.Dataset.from_arrays(*pictures())).accuracy
    split = byol.Dataset.from_sequence(photos.images[:40], photos.labels[:40], test_images=photos.images[40:])
    assert split.splits == {"train": 40, "test": 20}
    assert byol.Dataset.from_sequence(photos.images, test_images=[]).splits == {"train": 60}
    with pytest.raises(byol.RunError, match="same data set"):
        byol.resume(same)


class Broken(Photos):
    def __getitem__(self, i):
        if i == 7:
            raise LookupError("no such photo")
        return super().__getitem__(i)


def test_exceptions_of_a_sequence_arrive_unchanged(encoder, tmp_path):
    data = byol.Dataset.from_sequence(Broken())
    for work in (
        lambda: data.image(7),
        lambda: encoder.embed(data),
        lambda: byol.pretrain(data, tmp_path / "run", **SMALL),
        lambda: byol.evaluate.label_free(encoder, data),
    ):
        with pytest.raises(LookupError, match="no such photo"):
            work()
    # Images of the wrong kind, and files that are missing.
    with pytest.raises(byol.DataError, match="image 0: an array of float64 is not an image"):
        byol.Dataset.from_sequence([np.zeros((8, 8, 3))]).image(0)
    with pytest.raises(byol.DataError, match="image 0: a dict is not an image"):
        byol.Dataset.from_sequence([{"image": 1}]).image(0)
    with pytest.raises(byol.DataError, match="single image"):
        byol.Dataset.from_sequence(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(byol.DataError, match="missing.png"):
        byol.Dataset.from_sequence(["missing.png"]).image(0)
    with pytest.raises(byol.DataError, match="set is not a sequence"):
        byol.Dataset.from_sequence({1})
    with pytest.raises(byol.DataError, match="no images"):
        byol.Dataset.from_sequence([])


class Slow(Photos):
    """A data set that takes minutes to read, interrupted after some images."""

    raised = False

    def __getitem__(self, i):
        if self.reads >= 20 and not self.raised:
            self.raised = True
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        return super().__getitem__(i % 60)


@pytest.fixture
def python_handles_ctrl_c():
    """Python's own handler, which is not installed where Ctrl-C is ignored, as in background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_reading_of_images(tmp_path, python_handles_ctrl_c):
    photos = Slow(n=1000)
    with pytest.raises(KeyboardInterrupt):
        byol.pretrain(byol.Dataset.from_sequence(photos), tmp_path / "run", **SMALL)
    reads = photos.reads
    assert reads < 200 and not (tmp_path / "run" / "plan.toml").exists()
    time.sleep(0.2)
    assert photos.reads == reads


@pytest.mark.parametrize("evaluate", [byol.evaluate.knn, byol.evaluate.linear, byol.evaluate.label_free])
def test_ctrl_c_stops_an_evaluation(run, python_handles_ctrl_c, evaluate):
    photos = Slow(n=1000)
    data = byol.Dataset.from_sequence(photos, labels=[i % 3 for i in range(1000)])
    with pytest.raises(KeyboardInterrupt):
        evaluate(run.encoder, data)
    reads = photos.reads
    assert reads < 200
    time.sleep(0.2)
    assert photos.reads == reads


def test_sequence_is_not_read_after_an_interrupted_run(tmp_path):
    photos = Photos()
    data = byol.Dataset.from_sequence(photos)

    def stop(event):
        if event["kind"] == "step" and event["step"] == 2:
            raise RuntimeError("enough") from ValueError("cause")

    with pytest.raises(RuntimeError, match="enough") as raised:
        byol.pretrain(data, tmp_path / "run", callback=stop, **SMALL)
    assert isinstance(raised.value.__cause__, ValueError)
    reads = photos.reads
    time.sleep(0.3)
    assert photos.reads == reads


def test_run_has_plan_metrics_and_encoder(run):
    assert run.finished and run.plan["images"] + run.plan["held_out"] == 60
    assert [epoch["epoch"] for epoch in run.epochs] == [0, 1, 2, 3]
    assert len(run.steps) == run.plan["schedule"]["total"]
    assert all(step["loss"] < 5 for step in run.steps)
    assert 0 <= run.epochs[-1]["knn"] <= 1
    assert run.encoder.spec["width"] == 0.0625
    assert "resnet18" in repr(run.encoder)


@pytest.mark.filterwarnings("ignore:worse than")
def test_finished_run_has_a_verdict(run, tmp_path):
    assert run.verdict is None, "six monitoring images are too few"
    settings = {**SMALL, "epochs": 1, "warmup_epochs": 0}
    longer = byol.pretrain(byol.Dataset.from_arrays(*pictures(200)), tmp_path / "run", **settings)
    assert "kNN accuracy" in longer.verdict and "20 monitoring images" in longer.verdict


def test_events_have_the_values_of_the_metrics(data, tmp_path):
    events = []
    run = byol.pretrain(data, tmp_path / "run", callback=events.append, **SMALL)
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    assert losses == [step["loss"] for step in run.steps]
    kinds = {event["kind"] for event in events}
    assert kinds == {"step", "epoch", "checkpoint"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_stopped_run_resumes_to_the_same_bits(data, run, tmp_path, error):
    def stop(event):
        if event["kind"] == "step" and event["step"] == 5:
            raise error

    with pytest.raises(error):
        byol.pretrain(data, tmp_path / "run", callback=stop, **SMALL)
    stopped = byol.Run(tmp_path / "run")
    assert not stopped.finished
    with pytest.raises(byol.RunError, match="same data set"):  # the arrays have no path
        byol.resume(stopped)
    resumed = byol.resume(stopped, data)
    assert resumed.finished
    file = "encoder.safetensors"
    assert (resumed.path / file).read_bytes() == (run.path / file).read_bytes()


def test_run_can_be_extended(data, tmp_path):
    byol.pretrain(data, tmp_path / "run", **SMALL)
    longer = byol.resume(tmp_path / "run", data, epochs=4)
    assert longer.finished and longer.epochs[-1]["epoch"] == 4
    with pytest.raises(byol.RunError, match="completed epochs: 4"):
        byol.resume(longer, data, epochs=2)


def test_settings_reach_the_plan(data, tmp_path):
    settings = {"views.first.area": np.array([0.3, 1.0]), "views.first.solarize": np.float64(0.5), "norm.eps": 1e-3}
    run = byol.pretrain(data, tmp_path / "run", augment="overhead", settings=settings, **{**SMALL, "epochs": 2})
    first = run.plan["recipe"]["views"]["first"]
    assert first["area"] == [0.3, 1.0] and first["solarize"] == 0.5
    assert run.plan["encoder"]["eps"] == 1e-3
    assert first["rotate"] == 0.75 and first["hue"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recipe": "imagnet"}, byol.RecipeError, "imagnet"),
        ({"augment": "satellite"}, byol.RecipeError, "overhead"),
        ({"settings": {"views.siz": 3}}, byol.RecipeError, "views.size"),
        ({"settings": {"target.tau": 2}}, byol.RecipeError, "target.tau"),
        ({"batch": 1000}, byol.DataError, "exceeds"),
        ({"device": "gpu"}, byol.ByolError, "invalid device"),
        ({"init": "missing.pth", "recipe": "auto"}, byol.EncoderError, "missing.pth"),
        ({"epoch": 3}, TypeError, "epoch"),
        ({"epochs": -1}, ValueError, "epochs"),
        ({"settings": {"seed": None}}, TypeError, "None"),
    ],
)
def test_invalid_arguments_are_refused(data, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        byol.pretrain(data, tmp_path / "run", **{**SMALL, **arguments})
    assert not (tmp_path / "run").exists()


def test_existing_run_is_not_overwritten(data, run):
    with pytest.raises(byol.RunError, match="already contains a run"):
        byol.pretrain(data, run.path, **SMALL)


def test_embeddings_do_not_depend_on_the_kind_of_input(encoder, data, tmp_path):
    image = pytest.importorskip("PIL.Image")
    arrays = [data.image(i) for i in range(6)]
    paths = []
    for i, array in enumerate(arrays):
        paths.append(tmp_path / f"{i}.png")
        image.fromarray(array).save(paths[-1])
    expected = encoder.embed(arrays)
    assert expected.shape == (6, encoder.features) and expected.dtype == np.float32
    assert np.abs(expected[0] - expected[1]).max() > 0
    for same in [
        np.array(arrays),
        paths,
        [str(path) for path in paths],
        [image.open(path) for path in paths],
        (array for array in arrays),
        tmp_path,
        byol.Dataset.open(tmp_path),
    ]:
        assert np.array_equal(encoder.embed(same), expected)
    assert np.array_equal(encoder.embed(arrays, batch_size=4), expected)
    assert np.array_equal(encoder.embed(str(paths[2])), expected[2:3])
    assert np.array_equal(encoder.embed(arrays[2]), expected[2:3])
    assert encoder.embed([]).shape == (0, encoder.features)


def test_gray_images_are_rgb_images_of_equal_channels(encoder):
    gray = pictures()[0][0, :, :, 0]
    rgb = np.stack([gray] * 3, axis=-1)
    assert np.array_equal(encoder.embed(gray), encoder.embed(rgb))
    assert np.array_equal(encoder.embed(gray[:, :, None]), encoder.embed(rgb))


def test_arrays_of_other_libraries_are_images(encoder):
    class Foreign:
        def __init__(self, array):
            self.array = array

        def __array__(self, dtype=None, copy=None):
            return self.array

        def __iter__(self):
            raise AssertionError("iterated as a list of rows")

    images, _ = pictures(4)
    assert np.array_equal(encoder.embed(Foreign(images[0])), encoder.embed(images[0]))
    assert np.array_equal(encoder.embed(Foreign(images)), encoder.embed(images))
    with pytest.raises(byol.DataError, match="single image"):
        byol.Dataset.from_arrays(images[0])


def test_images_without_a_fixed_range_are_refused(encoder):
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(byol.DataError, match="mode F"):
        encoder.embed(image.new("F", (8, 8)))


def test_encoders_can_be_pickled_and_preprocess_in_forked_processes(encoder, data):
    copy = pickle.loads(pickle.dumps(encoder))
    assert np.array_equal(copy.embed(data.image(3)), encoder.embed(data.image(3)))
    if hasattr(os, "fork"):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            view = pool.apply_async(encoder.preprocess, (data.image(3),)).get(timeout=60)
        assert np.array_equal(view, encoder.preprocess(data.image(3)))


def test_unreadable_images_are_named(encoder, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(byol.DataError, match="broken.jpg"):
        encoder.embed([broken])
    with pytest.raises(byol.DataError, match="missing.png"):
        encoder.embed(tmp_path / "missing.png")


def test_progress_is_shown(encoder, data, capfd):
    encoder.embed(data, progress=True)
    assert "embedding 60/60" in capfd.readouterr().err


@pytest.mark.parametrize("path", ["missing", "missing.safetensors"])
def test_missing_encoders_are_refused(path):
    with pytest.raises(byol.EncoderError, match=path):
        byol.Encoder.open(path)


def test_preprocess_is_the_view_that_embed_uses(encoder, data, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    array = data.image(7)
    view = encoder.preprocess(array, normalize=False)
    size = encoder.spec["size"]
    assert view.shape == (3, size, size) and view.dtype == np.float32
    assert 0 <= view.min() and view.max() <= 1
    normalized = encoder.preprocess(array)
    mean = np.float32(encoder.spec["normalization"]["mean"])
    std = np.float32(encoder.spec["normalization"]["std"])
    assert np.allclose(normalized, (view - mean[:, None, None]) / std[:, None, None])

    assert encoder.export(tmp_path / "encoder.onnx") < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    features = session.run(None, {"images": view[None]})[0]
    assert np.allclose(features, encoder.embed(array), atol=1e-4)


def write_wav(path, samples, rate):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())


def test_sounds(tmp_path):
    for i in range(40):
        folder = tmp_path / "clips" / ("low" if i % 2 else "high")
        folder.mkdir(parents=True, exist_ok=True)
        t = np.arange(4000) / 8000
        write_wav(folder / f"{i}.wav", 0.3 * np.sin(2 * np.pi * (300 if i % 2 else 1500) * t + i), 8000)
    clips = byol.Dataset.open(tmp_path / "clips")
    assert clips.image(0).shape == (64, 51, 1)
    run = byol.pretrain(clips, tmp_path / "run", **{**SMALL, "epochs": 1, "warmup_epochs": 0})
    encoder = run.encoder
    assert encoder.spec["levels"] == {"sound": {"rate": 8000}}
    assert byol.evaluate.knn(encoder, tmp_path / "clips").accuracy > 0.5
    query = tmp_path / "clips/low/1.wav"
    assert encoder.embed(query).shape == (1, 32) and encoder.preprocess(query).shape == (1, 16, 16)
    write_wav(tmp_path / "other.wav", np.zeros(1600), 16000)
    assert np.isfinite(encoder.embed(tmp_path / "other.wav")).all()
    with pytest.raises(byol.DataError, match="trained on sounds"):
        encoder.embed(np.zeros((64, 51, 1), np.uint16))
    with pytest.raises(byol.DataError, match="trained on sounds"):
        byol.evaluate.knn(encoder, byol.Dataset.synthetic(20, 10))
    (tmp_path / "rates").mkdir()
    for i in range(4):
        write_wav(tmp_path / f"rates/{i}.wav", np.zeros(1600), 16000)
    with pytest.raises(byol.DataError, match="16000 Hz, but the encoder was trained at 8000 Hz"):
        encoder.embed(byol.Dataset.open(tmp_path / "rates"))
    assert encoder.embed(tmp_path / "rates").shape == (4, 32)


@in_repository
def test_documented_code_computes_the_view_of_a_sound(tmp_path, monkeypatch):
    pytest.importorskip("librosa")
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(20):
        (tmp_path / "clips").mkdir(exist_ok=True)
        write_wav(tmp_path / f"clips/{i}.wav", rng.uniform(-0.3, 0.3, 20000), 8000)
    run = byol.pretrain("clips", **{**SMALL, "epochs": 1, "warmup_epochs": 0})
    write_wav(tmp_path / "query.wav", 0.5 * np.sin(np.arange(20000) ** 1.2 / 30), 8000)
    page = (NOTEBOOK.parents[1] / "how-to/sounds.md").read_text(encoding="utf-8")
    names = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    expected = run.encoder.preprocess("query.wav", normalize=False)[None]
    assert np.abs(names["view"] - expected).max() < 1e-4


def test_state_dict_has_the_names_of_torchvision(encoder):
    state = encoder.state_dict()
    assert state["conv1.weight"].shape == (4, 3, 3, 3)
    assert state["layer4.1.bn2.running_var"].shape == (32,)
    assert state["bn1.num_batches_tracked"].dtype == np.int64


def test_torchvision_computes_the_same_features(encoder, data):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    expected = encoder.embed(data.image(5))
    model = encoder.to_torchvision()
    with torch.no_grad():
        features = model(torch.from_numpy(encoder.preprocess(data.image(5)))[None])
    assert np.allclose(features.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        {"width": 1.0},
        {"width": 0.125, "settings": {"encoder.stem": "imagenet"}},
        {"width": 0.25, "encoder": "resnet50"},
    ],
)
def test_timm_computes_the_same_features(data, tmp_path, flags):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    run = byol.pretrain(data, tmp_path / "run", **{**SMALL, **flags, "epochs": 1, "warmup_epochs": 0})
    encoder = run.encoder
    with torch.no_grad():
        features = encoder.to_timm()(torch.from_numpy(encoder.preprocess(data.image(5)))[None])
    assert np.allclose(features.numpy(), encoder.embed(data.image(5)), atol=1e-3)


def test_timm_and_transformers_load_the_folder_of_an_export(data, tmp_path):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    settings = {"encoder.stem": "imagenet"}
    small = {**SMALL, "width": 1.0, "size": 32, "epochs": 1, "warmup_epochs": 0}
    run = byol.pretrain(data, tmp_path / "run", settings=settings, **small)
    folder = tmp_path / "model"
    command_output("export", run.path, "--format", "hf", "-o", folder)
    view = torch.from_numpy(run.encoder.preprocess(data.image(5)))[None]
    expected = run.encoder.embed(data.image(5))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 32, 32) and config["crop_pct"] == run.encoder.spec["center"]
    with torch.no_grad():
        assert np.allclose(model(view).numpy(), expected, atol=1e-3)
    assert np.array_equal(byol.Encoder.open(folder).embed(data.image(5)), expected)

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        assert np.allclose(model(view).pooler_output.numpy(), expected, atol=1e-3)


def test_evaluations_agree_with_the_command(encoder, run, data, tmp_path):
    image = pytest.importorskip("PIL.Image")
    labels = data.labels()
    for i in range(len(data)):
        folder = tmp_path / ("test" if i % 5 == 0 else "train") / str(labels[i])
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(data.image(i)).save(folder / f"{i}.png")
    labeled = byol.Dataset.open(tmp_path)
    assert labeled.splits == {"train": 48, "test": 12}
    knn = byol.evaluate.knn(encoder, labeled, k=5)
    linear = byol.evaluate.linear(encoder, labeled)
    for result, command in [(knn, ["knn", "-k", "5"]), (linear, ["linear", "--fast"])]:
        assert result.low <= result.accuracy <= result.high
        assert result.accuracy == np.mean(result.predicted == result.labels)
        assert result.confusion().sum() == 12
        assert f"{100 * result.accuracy:.1f} %" in repr(result)
        printed = command_output("eval", command[0], run.path, tmp_path, *command[1:], "--json", "--device", "cpu")
        assert json.loads(printed)["rows"][0]["value"] == pytest.approx(result.accuracy)


def test_label_free_metrics_need_no_labels(encoder):
    images, _ = pictures()
    metrics = byol.evaluate.label_free(encoder, byol.Dataset.from_arrays(images))
    assert {"rankme", "lidar", "retrieval", "consistency"} <= metrics.keys()
    assert 0 <= metrics["retrieval"] <= 1 and metrics["images"] == 60
    with pytest.raises(byol.DataError, match="at least 16"):
        byol.evaluate.label_free(encoder, byol.Dataset.from_arrays(images[:10]))
    baseline = byol.evaluate.label_free(encoder.random(), byol.Dataset.from_arrays(images))
    assert baseline != metrics


def test_index_finds_maps_and_selects(encoder, data):
    features = encoder.embed(data)
    index = byol.Index(features)
    assert len(index) == 60
    rows, cosines = index.nearest(features[:4], k=3)
    assert rows.shape == cosines.shape == (4, 3)
    assert rows[:, 0].tolist() == [0, 1, 2, 3] and np.allclose(cosines[:, 0], 1)
    centered = features - features.mean(axis=0)
    unit = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    assert np.allclose(np.sort(unit[:4] @ unit.T)[:, :-4:-1], cosines, atol=1e-5)
    for method in ("tsne", "pca"):
        points = index.map(method)
        assert points.shape == (60, 2) and np.abs(points).max() <= 1
    assert index.outlier_scores().shape == (60,)
    selected = index.select(5)
    assert len(set(selected.tolist())) == 5
    with pytest.raises(byol.DataError, match="dimension 3"):
        index.nearest(np.zeros(3))
    with pytest.raises(ValueError, match="umap"):
        index.map("umap")
    for unusable in (np.zeros((0, 4)), np.full((2, 2), np.nan), np.zeros(4)):
        with pytest.raises(byol.DataError):
            byol.Index(unusable)


def test_arrays_may_have_a_test_split(encoder):
    images, labels = pictures()
    data = byol.Dataset.from_arrays(images[:40], labels[:40], test_images=images[40:], test_labels=labels[40:])
    assert data.splits == {"train": 40, "test": 20}
    assert len(byol.evaluate.knn(encoder, data).labels) == 20
    with pytest.raises(byol.DataError, match="same class"):
        byol.evaluate.knn(encoder, byol.Dataset.from_arrays(images, [0] * 60))


def test_evaluations_need_labels(encoder):
    unlabeled = byol.Dataset.from_arrays(pictures()[0])
    with pytest.raises(byol.DataError, match="no labels"):
        byol.evaluate.knn(encoder, unlabeled)
    with pytest.raises(byol.ByolError, match="at least 1"):
        byol.evaluate.knn(encoder, unlabeled, k=0)


def test_threads_may_share_an_encoder(encoder, data):
    expected = encoder.embed(data.image(1))
    results = [None] * 100

    def embed(i):
        results[i] = encoder.embed(data.image(1))

    threads = [threading.Thread(target=embed, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(np.array_equal(result, expected) for result in results)


FORK = """
import os, sys, numpy, byol
path, used = sys.argv[1], sys.argv[2] == "used"
image = numpy.zeros((8, 8, 3), numpy.uint8)
if used:
    byol.Encoder.open(path, "cpu").embed(image)
child = os.fork()
if child == 0:
    try:
        print(byol.Encoder.open(path, "cpu").embed(image).shape, flush=True)
    except byol.ByolError as error:
        print(error, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(("before", "printed"), [("unused", "(1, 32)"), ("used", "`spawn`")])
def test_forked_processes_do_not_hang(run, before, printed):
    command = [sys.executable, "-c", FORK, str(run.path), before]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert printed in output


def test_exceptions_of_the_users_images_arrive_unchanged(encoder):
    def images():
        yield np.zeros((8, 8, 3), np.uint8)
        raise LookupError("my own")

    for use in [encoder.embed, byol.Dataset.from_arrays]:
        with pytest.raises(LookupError, match="my own"):
            use(images())


def test_synthetic_images_are_those_of_the_demo():
    data = byol.Dataset.synthetic(12, 6)
    assert data.splits == {"train": 12, "test": 6} and len(data.classes) == 6
    assert data.image(0).shape == (32, 32, 3)
    with pytest.raises(byol.DataError):
        byol.Dataset.synthetic(0)


def command_output(*args):
    command = [sys.executable, "-m", "byol", *(str(arg) for arg in args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_package_contains_the_command():
    assert command_output("--version").strip() == f"byol {byol.__version__}"
    failed = subprocess.run([sys.executable, "-m", "byol", "embed", "x"], capture_output=True, text=True)
    assert failed.returncode == 2 and "Usage: byol" in failed.stderr
    failed = subprocess.run([sys.executable, "-m", "byol", "report", "x"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ")


def test_command_starts_itself_and_stops_on_ctrl_c(encoder, data, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(20):
        image.fromarray(data.image(i)).save(tmp_path / f"{i}.png")
    # `plan` measures in processes of its own.
    small = ["--encoders", "resnet18x0.0625", "--batches", "4", "--device", "cpu", "--json"]
    assert json.loads(command_output("plan", tmp_path, *small))["rows"][0]["fits"]
    encoder.export(tmp_path / "encoder.safetensors")
    command_output("embed", tmp_path / "encoder.safetensors", tmp_path, "-o", tmp_path / "e.npy", "--device", "cpu")
    explore = [sys.executable, "-m", "byol", "explore", str(tmp_path / "e.npy"), "--port", "0", "--map", "pca"]
    with subprocess.Popen(explore, stderr=subprocess.PIPE, text=True) as server:
        for line in server.stderr:
            if "press Ctrl-C to stop" in line:
                break
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) != 0


#: The notebook's code in one epoch.
SMALLER = [
    ("epochs=12, size=24", "epochs=1, size=16, width=0.0625"),
    ("assert trained.accuracy > random.accuracy + 0.02", ""),
]


def write_cifar10(folder):
    """Write generated images as the files of CIFAR-10 that the notebook reads."""
    data = byol.Dataset.synthetic(200, 60)
    folder.mkdir()
    for name, split in (("data_batch_1", "train"), ("test_batch", "test")):
        images = np.stack([data.image(i, split) for i in range(data.splits[split])])
        # At least one image of each of the ten classes.
        batch = {b"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1)}
        batch[b"labels"] = [i % 10 for i in range(len(images))]
        (folder / name).write_bytes(pickle.dumps(batch))


def smaller_notebook():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for text, replacement in SMALLER:
        cells = [cell for cell in notebook["cells"] if text in "".join(cell["source"])]
        assert len(cells) == 1, text
        cells[0]["source"] = "".join(cells[0]["source"]).replace(text, replacement)
    return notebook


@in_repository
def test_types_are_consistent(tmp_path):
    pytest.importorskip("mypy")
    options = ["--config-file", str(NOTEBOOK.parents[2] / "pyproject.toml"), "--cache-dir", str(tmp_path)]
    package = Path(byol.__file__).parent
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "-p", "byol"], cwd=package.parent, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


@in_repository
def test_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "cifar-10-batches-py")
    cells = [cell for cell in smaller_notebook()["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    exec(compile(code, str(NOTEBOOK), "exec"), {})
    assert byol.Run("byol-runs/run").finished


def shape(output):
    """Return the kind of an output: its media types, or its text without numbers."""
    if output["output_type"] == "stream":
        return [re.sub(r"[-\d. ]+", "0", line) for line in "".join(output["text"]).splitlines()]
    # Pillow also offers JPEG, which the page leaves out.
    return sorted({*output.get("data", {"error": output.get("ename")})} - {"image/jpeg"})


@in_repository
def test_notebook_shows_the_output_of_its_cells(tmp_path):
    pytest.importorskip("PIL.Image")
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    shown = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    write_cifar10(tmp_path / "cifar-10-batches-py")
    notebook = nbformat.reads(json.dumps(smaller_notebook()), as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    for cell, executed in zip(shown, notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "import timm" in source:
            continue
        kinds, actual = ([shape(output) for output in outputs] for outputs in (cell["outputs"], executed["outputs"]))
        # One epoch prints fewer lines than 16.
        expected = kinds[:1] + kinds[-1:] if "byol.pretrain" in source else kinds
        assert expected == actual, source


@in_repository
def test_documented_code_computes_the_features_of_an_exported_encoder(encoder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[:300, :200]
    pixels = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), (x + y) % 256], axis=-1)
    image.fromarray(pixels.astype(np.uint8)).save("photo.jpg", format="png")
    encoder.export("encoder.onnx")
    page = (NOTEBOOK.parents[1] / "how-to/use.md").read_text(encoding="utf-8")
    blocks = [block for block in page.split("```python\n")[1:] if "onnxruntime" in block.split("```")[0]]
    assert len(blocks) == 1
    names = {}
    exec(blocks[0].split("```")[0], names)
    assert np.abs(names["features"] - encoder.embed("photo.jpg")).max() < 1e-4


def test_everything_public_is_documented():
    for name in byol.__all__:
        item = getattr(byol, name)
        if isinstance(item, str):
            continue
        assert item.__doc__, name
        for attribute in vars(item) if isinstance(item, type) else []:
            if not attribute.startswith("_"):
                assert getattr(item, attribute).__doc__, f"{name}.{attribute}"
