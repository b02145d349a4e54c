"""Save networks to and load them from the Hugging Face hub, and folders with the same layout.

    from sparse_sr_attn.checkpoints import hub

    hub.push_to_hub(model, "me/lcoan-x2")
    model = hub.from_pretrained("me/lcoan-x2")

A folder or repository holds `model.safetensors` (the weights), `config.json` (the options, which may be edited) and a
`README.md`. This module needs huggingface_hub; no other module of the package imports it.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from sparse_sr_attn.backbones.base import OPTIONS, Network, encode_options, options_of
from sparse_sr_attn.checkpoints.load import load_model
from sparse_sr_attn.checkpoints.read import is_known
from sparse_sr_attn.checkpoints.unwrap import find
from sparse_sr_attn.errors import CheckpointError, SparseSRError

try:
    from huggingface_hub import ModelHubMixin, hf_hub_download
    from safetensors.torch import load_file, save_file
except ImportError as error:
    message = "loading from and saving to the hub needs huggingface_hub: pip install huggingface_hub"
    raise ImportError(message) from error

_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"

_CARD_TEMPLATE = """\
---
{{ card_data }}
---

# {{ type }} ×{{ upscale }}

A network for image super-resolution with {{ parameters }} parameters, made with sparse_sr_attn. Its options are in
`config.json`.

```python
from sparse_sr_attn.checkpoints import hub

model = hub.from_pretrained("{{ source }}")  # images (b, {{ num_in_ch }}, h, w) in 0..1
```
"""


def save_pretrained(model: Network, folder: str | os.PathLike[str]) -> None:
    """Write weights, options and a model card to a folder, which is created if necessary.

    Args:
        model: an `LCoAN`, `ELAN`, `EDSR` or `RCAN`, on any device.
        folder: existing weights and options in it are replaced, after all files are written; an existing README is
            kept.

    Raises:
        CheckpointError: `model` is not a network of this library, or JSON cannot represent one of its options. Nothing
            is written.
    """
    hosted = _Hosted(model)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as beside:
        hosted.save_pretrained(beside, model_card_kwargs=hosted.card(folder.resolve().name))
        for file in Path(beside).iterdir():
            if file.name != _CARD or not (folder / _CARD).exists():
                file.replace(folder / file.name)


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    **overrides: Any,
) -> Network:
    """Load a network from a folder or a repository of the hub, in evaluation mode.

    Args:
        source: a folder that `save_pretrained` wrote, or a repository, `"owner/name"`. Without a `config.json` the
            weights may be of any layout that `load_model` knows.
        revision: branch, tag or commit of the repository; `None` for its main branch.
        token: access token; `None` for the one stored on this machine.
        cache_dir: folder for downloads; `None` for huggingface_hub's default.
        force_download: whether to download files that are already cached.
        local_files_only: whether to use only cached files.
        overrides: as in `load_model`. They override `config.json`, which overrides the options stored with the weights.

    Raises:
        CheckpointError: there is no such folder or repository, it cannot be reached, or its files do not fit together.
        ConfigError: an override is unknown or invalid.

    Note:
        Weights are read only from safetensors. No code from a repository is downloaded or run.

    Examples:
        >>> model = hub.from_pretrained("me/lcoan-x2", chunk_size=1024)  # doctest: +SKIP
    """
    source = os.path.expanduser(source)
    try:
        return _Hosted.from_pretrained(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            overrides=overrides,
        ).network
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error.__cause__
    except SparseSRError:
        raise
    except Exception as error:  # of the network, of the hub, or of a malformed file
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{source}: must be a folder here or a repository of the hub, with {_WEIGHTS} and {_CONFIG} that can be "
            f"read; got {type(error).__name__}: {reason}"
        ) from error


def push_to_hub(model: Network, repo_id: str, **options: Any) -> str:
    """Upload weights, options and a model card in one commit; return its URL.

    Args:
        model: as in `save_pretrained`.
        repo_id: the repository, `"owner/name"`; created if it does not exist, public unless `private=True`. Its README
            is replaced, unless `ignore_patterns="README.md"`.
        options: options of `huggingface_hub.ModelHubMixin.push_to_hub`: `private`, `token`, `branch`, `create_pr`,
            `commit_message`, ...

    Raises:
        CheckpointError: as in `save_pretrained`; nothing is uploaded.
        huggingface_hub.errors.HfHubHTTPError: the hub rejects the upload.
    """
    hosted = _Hosted(model)
    return hosted.push_to_hub(repo_id, model_card_kwargs=hosted.card(repo_id), **options)


class _Hosted(
    ModelHubMixin,
    library_name="sparse_sr_attn",
    pipeline_tag="image-to-image",
    tags=["super-resolution"],
    model_card_template=_CARD_TEMPLATE,
):
    """A network with the interface of huggingface_hub's mixin."""

    def __init__(self, network: Network) -> None:
        if not isinstance(network, Network):
            raise CheckpointError(
                f"model must be a network of sparse_sr_attn, without a wrapper, got a {type(network).__name__}"
            )
        config = options_of(network)
        if config is None:
            raise CheckpointError(f"all options of the {type(network).__name__} must be such that JSON can write them")
        self.network = network
        self.config = config

    def card(self, source: str) -> dict[str, Any]:
        """Return the fields of the model card."""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return {**self.config, "parameters": f"{parameters:,}", "source": source}

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {key: value.contiguous() for key, value in self.network.state_dict().items()}
        save_file(weights, save_directory / _WEIGHTS)
        (save_directory / _CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        overrides: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        **download: Any,
    ) -> "_Hosted":
        here = os.path.isdir(model_id)
        file = Path(model_id) / _WEIGHTS if here else hf_hub_download(model_id, _WEIGHTS, **download)
        weights: dict[str, Tensor] = load_file(file)
        if config is not None:
            found = find(weights, is_known)
            weights = {**(found.chosen.state if found else weights), OPTIONS: encode_options(config)}
        return cls(load_model(weights, **(overrides or {})))
