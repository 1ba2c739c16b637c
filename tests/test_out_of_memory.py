"""The message of training that does not fit into the memory: the next way to save some that the run does not use."""

import pytest
import torch

import train_instruct_pix2pix
from tests.pairs import save_pairs
from tests.runs import training_flags, weights_of
from utils.cli import pick
from utils.errors import InputError
from utils.training.flags import parse_training_flags
from utils.training.objective import Objective
from utils.training.out_of_memory import explaining_out_of_memory
from utils.training.settings import Settings

LADDER = (  # the flags so far -> the advice
    ((), "give --mixed_precision bf16"),
    (("--mixed_precision=bf16",), "give --gradient_checkpointing"),
    (("--gradient_checkpointing",), "give --train_batch_size 4 --gradient_accumulation_steps 2"),
    (("--train_batch_size=1", "--use_ema"), "give --ema_device cpu"),
    (("--ema_device=cpu",), "give --optimizer adamw8bit"),
    (("--optimizer=adamw8bit",), "train an adapter with --lora_rank 16"),
    (("--lora_rank=16",), "give --quantize_base nf4"),
    (("--quantize_base=nf4",), "give a --resolution below 256"),
)
ERRORS = (
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
)


def settings(*flags: str) -> Settings:
    base = ["--pretrained_model_name_or_path=me/base", "--dataset_name=me/pairs", "--train_batch_size=8"]
    return pick(parse_training_flags([*base, *flags], "x"), Settings)


def test_the_advice_goes_down_the_ladder() -> None:
    flags: tuple[str, ...] = ()
    for added, advice in LADDER:
        flags += added
        with pytest.raises(InputError, match=f"out of memory: {advice}"), explaining_out_of_memory(settings(*flags)):
            raise ERRORS[0]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_every_allocator_is_understood(error: Exception) -> None:
    with pytest.raises(InputError, match="out of memory: .*Earlier checkpoints are kept"):  # noqa: SIM117
        with explaining_out_of_memory(settings()):
            raise error


@pytest.mark.parametrize("largest", [2, 4, 0])
def test_auto_batch_size(largest, tiny_base, tmp_path, monkeypatch, caplog, capsys) -> None:
    """The largest part that fits, with the weights of a run with that size; nothing fits: a message."""
    pairs, call = save_pairs(tmp_path / "pairs", 7), Objective.__call__

    def limited(self: Objective, unet: torch.nn.Module, batch: dict) -> torch.Tensor:
        if len(batch["prompts"]) > largest:
            raise ERRORS[0]
        return call(self, unet, batch)

    given = ("--train_batch_size=4", "--auto_batch_size", "--max_train_steps=2", "--use_ema")
    explicit = (f"--train_batch_size={largest}", f"--gradient_accumulation_steps={4 // (largest or 4)}", *given[2:])
    monkeypatch.setattr(Objective, "__call__", limited)
    if not largest:
        with pytest.raises(SystemExit):
            train_instruct_pix2pix.main(training_flags(tiny_base, pairs, tmp_path / "auto", *given))
        assert "not even one sample fits" in capsys.readouterr().err
        return
    assert train_instruct_pix2pix.main(training_flags(tiny_base, pairs, tmp_path / "auto", *given)) == 0
    assert f"--train_batch_size {largest} --gradient_accumulation_steps {4 // largest}" in caplog.text
    assert train_instruct_pix2pix.main(training_flags(tiny_base, pairs, tmp_path / "given", *explicit)) == 0
    assert weights_of(tmp_path / "auto/unet") == weights_of(tmp_path / "given/unet")


def test_other_errors_stay_and_a_killed_worker_is_named() -> None:
    with pytest.raises(RuntimeError, match="shape"), explaining_out_of_memory(settings()):
        raise RuntimeError("shape mismatch")
    flags = settings("--dataloader_num_workers=4")
    with pytest.raises(InputError, match=r"lower --dataloader_num_workers \(now 4\)"), explaining_out_of_memory(flags):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
