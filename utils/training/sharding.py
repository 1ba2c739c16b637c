"""Sharded training (FSDP2): each process keeps a part of the weights, gradients, EMA and optimizer state.

A sharded checkpoint contains them as `shards/*.safetensors`, written by torch.distributed.checkpoint: each process
writes its part, and any number of processes can read it.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.errors import InputError
from utils.training.checkpoints import trained_weights
from utils.training.ema import MovingAverage

SHARDS = "shards"  # folder in a checkpoint
Tensors = dict[str, torch.Tensor]


def shard_unet(
    unet: UNet2DConditionModel, accelerator: Accelerator, blocks: tuple[str, ...], reshard: bool, offload: bool
) -> None:
    """Divide the weights, in place; the settings are those of `sharding_settings.Sharding`.

    Raises `InputError` for block classes that the UNet does not have.
    """
    classes = {type(module).__name__ for module in unet.modules()}
    if missing := [name for name in blocks if name not in classes]:
        raise InputError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(missing)}, which this UNet does not have; leave it "
            "out for the default"
        )
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    options = dict(
        mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        reshard_after_forward=reshard,
        # Gathered in 16 bits, averaged in 32. Autocast decides about the inputs, as it does without sharding.
        mp_policy=MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
        ),
    )
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=accelerator.device.type == "cuda")
    for module in [module for module in unet.modules() if type(module).__name__ in blocks][::-1]:
        fully_shard(module, **options)
    fully_shard(unet, **options)


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def free_gathered(model: torch.nn.Module) -> None:
    """Free what a forward pass without a backward pass has left gathered: the parameters are the parts again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def put_tensor(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole value into a tensor that may be divided; each process copies its part."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


@torch.no_grad()
def gather(tensors: Tensors, accelerator: Accelerator) -> Tensors:
    """Whole tensors in the main process's CPU memory, one after the other; {} in the others. For every process."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if accelerator.is_main_process:
            whole[name] = full.to("cpu", copy=True)
    return whole


def make_whole_unet(sharded: UNet2DConditionModel, weights: Tensors) -> UNet2DConditionModel:
    """A plain UNet on the CPU with gathered weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sharded.config)
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's state by parameter and name, such as `conv_in.weight/exp_avg`; made where it does not exist yet."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:  # as AdamW makes it at its first step
            is_fused = optimizer.param_groups[0].get("fused")
            state["step"] = torch.zeros((), device=parameter.device if is_fused else "cpu")
            state |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        tensors |= {f"{name}/{key}": value for key, value in state.items()}
    return tensors


def _put_groups(optimizer: torch.optim.Optimizer, stored: list[dict]) -> None:
    for group, values in zip(optimizer.param_groups, stored, strict=True):
        group.update({key: value for key, value in values.items() if key not in ("params", "fused")})


def put_all(targets: Tensors, values: Tensors) -> None:
    """Copy whole values by name into tensors that may be divided."""
    for name, target in targets.items():
        put_tensor(target, values[name])


def put_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the state of an optimizer of whole weights into one of divided weights."""
    values = {}
    for index, (name, _) in enumerate(model.named_parameters()):
        values |= {f"{name}/{key}": value for key, value in state["state"].get(index, {}).items()}
    put_all(_optimizer_tensors(model, optimizer), values)
    _put_groups(optimizer, state["param_groups"])


def _state_tensors(model: torch.nn.Module, ema: MovingAverage | None, optimizer: torch.optim.Optimizer) -> Tensors:
    """Every tensor of a checkpoint by its name there; not copies."""
    parts = {"unet": trained_weights(model), "optimizer": _optimizer_tensors(model, optimizer)}
    if ema:
        parts["unet_ema"] = ema.state_dict()
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def save_shards(
    folder: Path, model: torch.nn.Module, ema: MovingAverage | None, optimizer: torch.optim.Optimizer
) -> None:
    """Write this process's part; every process calls it. Raises OSError in all of them where one cannot write."""
    tensors = _state_tensors(model, ema, optimizer)
    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    except dcp.api.CheckpointException as error:
        raise OSError(str(next(iter(error.failures.values()))[0])) from error


def load_shards(
    checkpoint: Path,
    model: torch.nn.Module,
    ema: MovingAverage | None,
    optimizer: torch.optim.Optimizer,
    optimizer_state: dict,
) -> None:
    """Read into whole or divided weights. Raises `InputError` for the checkpoint of another model."""
    tensors = _state_tensors(model, ema, optimizer)
    try:
        reader = dcp.HuggingFaceStorageReader(str(checkpoint / SHARDS))
        with warnings.catch_warnings():  # about reading in a single process
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    except (dcp.api.CheckpointException, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"{checkpoint} does not fit the model of this command; give the --pretrained_model_name_or_path that the "
            "run was started with"
        ) from error
    _put_groups(optimizer, optimizer_state["param_groups"])
