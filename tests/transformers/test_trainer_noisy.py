"""noisy under Trainer: noise on embeddings, fickle text teachers, noise in pixel units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from image_kit import image_classifier, image_trainer
from trainer_kit import Texts, bert, trainer

from kd_plugins import DistillError


def test_trainer_noise_on_embeddings(tmp_path: Any) -> None:
    student, data = bert(1), Texts(4)
    seen: list[torch.Tensor] = []
    student.bert.embeddings.word_embeddings.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    run = trainer(tmp_path, "noisy", {"sigma": 0.5}, student=student, of=bert(2), data=data, max_steps=1)
    given: list[torch.Tensor] = []
    student.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda _m, args: given.append(args[0].detach()))
    table = student.bert.embeddings
    added = (table.token_type_embeddings.weight[0] + table.position_embeddings.weight).detach().clone()
    run.train()
    clean = seen[-1] + added[: seen[-1].shape[1]]
    noise = given[-1] - clean
    real = seen[-1][data.mask.bool()]  # the padding's embedding is 0
    assert noise.std().item() == pytest.approx(0.5 * real.std().item(), rel=0.1)


def test_trainer_noise_on_embeddings_with_adapters(tmp_path: Any) -> None:
    """Once, where the embeddings have an adapter too."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "word_embeddings"])
    student, data = peft.get_peft_model(bert(1), config), Texts(4)
    embeddings = student.base_model.model.bert.embeddings
    table = embeddings.token_type_embeddings.weight[0] + embeddings.position_embeddings.weight
    seen: list[torch.Tensor] = []
    embeddings.word_embeddings.base_layer.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    embeddings.LayerNorm.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    trainer(tmp_path, "noisy", {"sigma": 0.5}, student=student, of=bert(2), data=data, max_steps=1).train()
    clean, noisy = seen[-2:]
    noise = noisy - table.detach()[: clean.shape[1]] - clean
    assert noise.std().item() == pytest.approx(0.5 * clean[data.mask.bool()].std().item(), rel=0.1)


def test_trainer_fickle_text_teacher_and_pixel_noise(tmp_path: Any) -> None:
    options = {"data": Texts(4), "max_steps": 1}
    with pytest.raises(DistillError, match="needs a teacher with dropout"):
        trainer(tmp_path / "a", "noisy", {"fickle": True}, student=bert(1), of=bert(2), **options).train()
    trainer(tmp_path / "b", "noisy", {"fickle": True}, student=bert(1), of=bert(2, dropout=True), **options).train()
    processor = transformers.ViTImageProcessor()
    run = image_trainer(
        tmp_path / "c",
        image_classifier([4, 8], 0),
        epochs=1,
        teacher_model=image_classifier([4, 8], 1),
        distiller="noisy",
        distiller_args={"sigma": 0.1, "messy": 0.1},
        processing_class=processor,
    )
    run.train()
    assert {"distill/kd", "distill/task"} <= set().union(*run.state.log_history)


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ({"image_mean": (0.5, 0.4, 0.3), "image_std": (0.25, 0.2, 0.5)}, [0.5, 0.4, 0.3], [0.25, 0.2, 0.5]),
        ({"do_rescale": False, "image_mean": (0.5,), "image_std": (0.25,)}, [0.5], [0.25]),
        ({"do_normalize": False}, [0.0], [1.0]),
        ({"do_normalize": False, "rescale_factor": 2 / 255}, [0.0], [0.5]),
    ],
)
def test_what_an_image_processor_makes_of_pixels(
    tmp_path: Any, given: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    run = image_trainer(tmp_path, image_classifier([4, 8], 0), processing_class=transformers.ViTImageProcessor(**given))
    batch = run._batch(next(iter(run.get_train_dataloader())))
    assert batch.mean == pytest.approx(mean)
    assert batch.std == pytest.approx(std)


@pytest.mark.parametrize(
    ("processor", "told"),
    [
        ("Wav2Vec2FeatureExtractor", (None, None)),
        ("Pix2StructImageProcessor", (None, None)),
        ("FuyuImageProcessor", ([0.5], [0.5])),
    ],
    ids=["sound", "each image by its own mean", "one number"],
)
def test_other_processors_do_not_stop_the_training(tmp_path: Any, processor: str, told: tuple[Any, Any]) -> None:
    given = getattr(transformers, processor)()
    run = image_trainer(tmp_path, image_classifier([4, 8], 0), processing_class=given)
    batch = run._batch({"pixel_values": torch.zeros(2, 3, 8, 8), "labels": torch.tensor([0, 1])})
    assert (batch.mean, batch.std) == told
