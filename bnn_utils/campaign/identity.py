"""What a campaign is: the lines in which two must agree before their rows may stand in one file."""

import hashlib
import json
from dataclasses import asdict

import torch
from torch import nn

from bnn_utils.campaign.trial import Terms, trial_seed
from bnn_utils.checkpoints import checksum
from bnn_utils.data import Images
from bnn_utils.evaluation import Data, Measure, device_type
from bnn_utils.faults import ErrorModel, float32_storage, inject_tensors
from bnn_utils.models import config_of, name_of
from bnn_utils.packed import PackedModel, deployed, pack


def _injection(error: ErrorModel) -> str:
    """Return a digest of what damage does, which changes if random streams or injection ever draw otherwise."""
    digest = hashlib.sha256(str(trial_seed(1, 1e-3, 2)).encode())
    for probability in (1e-4, 1e-2, 0.3):
        probe = {"numbers": torch.linspace(-2, 2, 3000), "words": torch.arange(1500) - 700}
        with inject_tensors(probe, probability, seed=3, error=error):
            digest.update(checksum("", probe).encode())
    return digest.hexdigest()


def _data(model: nn.Module, data: Data | Measure, terms: Terms) -> dict[str, str]:
    if isinstance(data, Measure):  # code has no digest that lasts; what it gives of the whole network stands for it
        with float32_storage(model):
            held = pack(model) if terms.storage == "packed" else model
            return {"function's number, undamaged": str(data(held).accuracy)}
    if isinstance(data, Images):
        content = checksum(json.dumps([data.mean, data.std]), {"pixels": data.pixels, "labels": data.labels})
    else:
        content = checksum("", {"inputs": data.inputs, "labels": data.labels})
    return {"images": str(len(data)), "images' SHA-256": content}


def fingerprint(model: nn.Module, data: Data | Measure, terms: Terms) -> dict[str, str]:
    """Return what identifies a campaign: rows of two campaigns that agree in these lines may stand in one file."""
    with float32_storage(model):
        state = model.state_dict()
        stored = checksum("", state)
        packed = terms.storage == "packed" or isinstance(deployed(model), PackedModel)
    config = config_of(model)
    kinds = sorted({str(x.dtype) for x in state.values() if x.is_floating_point()})
    rates = {name: value for name, value in asdict(terms.error).items() if name not in ("meaning", "source")}
    return {
        "network": name_of(model),
        "config": " ".join(str(model).split()) if config is None else json.dumps(config),
        "network's SHA-256": stored,
        "dataset": data.dataset,
        **_data(model, data, terms),
        "storage": terms.storage,
        "repairs": ", ".join(terms.repairs),
        "targets": ", ".join(terms.targets),
        "error": ", ".join(f"{name} {value}" for name, value in rates.items()),
        "seed": str(terms.seed),
        "arithmetic": "packed integers" if packed else f"{', '.join(kinds)} on {device_type(model)}",
        "injection": _injection(terms.error),
    }
