"""One PPO update of a LLaVA in plain PyTorch, as a careful engineer writes it: the peer of update_vs_torch.py.

Eager, scaled-dot-product attention, LoRA on frozen projections, the head on response positions alone, gradients for
the adapters and the value head alone, AdamW with fused steps where the device has them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """What the loss and the optimizer take; names as in `icet_jax.algorithms.settings`."""

    lora_scale: float
    clip_range: float
    value_coef: float
    temperature: float
    suppress_ids: tuple[int, ...]
    learning_rate: float
    max_grad_norm: float


class TorchUpdate:
    """The model, its adapters and its optimizer."""

    def __init__(
        self, config: Any, image_token: int, weights: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]],
        value_head: Mapping[str, Any], hyper: Hyperparameters, device: str, checkpointing: bool = False,
    ):  # fmt: skip
        """Takes the weights of the jax model: same numbers, in torch's layout ([out, in], one tensor per layer).

        Args:
          config: `LlamaConfig`.
          image_token: placeholder of image features.
          weights: name below `language_model/` -> jax array; layers stacked.
          adapters: target -> {"a": [L, in, r], "b": [L, r, out]}, float32.
          value_head: {"kernel": [E, 1], "bias": [1]}, float32.
          hyper: see `Hyperparameters`.
          device: "cpu" or "cuda".
          checkpointing: whether each layer is computed again in the backward pass.
        """
        self.config, self.image_token, self.hyper, self.checkpointing = config, image_token, hyper, checkpointing

        def tensor(array: Any) -> torch.Tensor:
            if device == "cpu":
                return torch.tensor(np.asarray(array))
            return torch.from_dlpack(array)

        def layer(number: int) -> dict[str, torch.Tensor]:
            found = {}
            for name, array in weights.items():
                stack, *rest = name.split("/")
                if stack == "layers":
                    # [in, out] is stored as torch does it: [out, in], contiguous.
                    one = tensor(array[number])
                    found[rest[0]] = one.t().contiguous() if rest[1] == "kernel" else one.clone()
            return found

        self.layers = [layer(number) for number in range(config.num_hidden_layers)]
        self.embedding = tensor(weights["embed_tokens"])
        self.norm = tensor(weights["norm/scale"])
        self.head = tensor(weights["lm_head/kernel"]).t().contiguous()

        def trained(array: Any) -> torch.Tensor:
            return torch.tensor(np.asarray(array), device=device).t().contiguous().requires_grad_()

        self.adapters = [
            {name: (trained(pair["a"][number]), trained(pair["b"][number])) for name, pair in adapters.items()}
            for number in range(config.num_hidden_layers)
        ]
        self.value_kernel = trained(value_head["kernel"])
        self.value_bias = torch.tensor(np.asarray(value_head["bias"]), device=device).requires_grad_()
        flat = [tensor for layer in self.adapters for pair in layer.values() for tensor in pair]
        self.parameters = [*flat, self.value_kernel, self.value_bias]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=hyper.learning_rate, weight_decay=0.0, fused=device == "cuda" or None
        )

    def update(self, batch: Mapping[str, torch.Tensor], slices: int = 1) -> dict[str, torch.Tensor]:
        """One optimizer step on the batch, slice by slice; returns its loss, statistics and gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, torch.Tensor] = {}
        tokens = batch["mask"].sum()
        for number in range(slices):
            part = {name: tensor[number::slices] for name, tensor in batch.items()}
            share = part["mask"].sum() / tokens
            loss, stats = self.loss(part)
            (loss * share).backward()
            total = {name: total.get(name, 0.0) + share * value for name, value in stats.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.hyper.max_grad_norm)
        self.optimizer.step()
        return total | {"grad_norm": norm}

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients after `loss(...).backward()`, named and laid out as the jax state's."""
        found = {}
        for name in self.adapters[0]:
            for index, part in enumerate("ab"):
                grads = [layer[name][index].grad.float().t().cpu().numpy() for layer in self.adapters]
                found[f"policy/{name}/{part}"] = np.stack(grads)
        found["value_head/kernel"] = self.value_kernel.grad.t().cpu().numpy()
        found["value_head/bias"] = self.value_bias.grad.cpu().numpy()
        return found

    def loss(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Clipped surrogate + value_coef * squared error, token means; fields are those of `lppo.TrainBatch`."""
        hyper, mask = self.hyper, batch["mask"]
        width = batch["prompts"].shape[1]
        tokens = torch.cat([batch["prompts"], batch["responses"][:, :-1]], dim=1)
        token_mask = torch.cat([batch["prompt_mask"], mask[:, :-1]], dim=1)
        hidden = self.hidden(tokens, token_mask, batch["visual"])[:, width - 1 :]
        # The head runs on real response tokens alone.
        chosen = hidden[mask]
        logits = F.linear(chosen, self.head).float() / hyper.temperature
        logits[:, list(hyper.suppress_ids)] = torch.finfo(logits.dtype).min
        log_probs = torch.log_softmax(logits, dim=-1)
        new = log_probs.gather(-1, batch["responses"][mask][:, None])[:, 0]
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        values = F.linear(chosen.float(), self.value_kernel, self.value_bias)[:, 0]
        ratio = torch.exp(new - batch["old_log_probs"][mask])
        advantages = batch["advantages"][mask]
        clipped = torch.clamp(ratio, 1 - hyper.clip_range, 1 + hyper.clip_range)
        policy = torch.maximum(-ratio * advantages, -clipped * advantages).mean()
        value = torch.square(values - batch["returns"][mask]).mean()
        loss = policy + hyper.value_coef * value
        return loss, {"loss": loss.detach(), "policy": policy.detach(), "value": value.detach(), "entropy": entropy}

    def hidden(self, tokens: torch.Tensor, mask: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """The decoder over tokens and image features, causal, padding never seen."""
        x = F.embedding(tokens, self.embedding)
        x = x.masked_scatter((tokens == self.image_token)[..., None], visual.to(x.dtype))
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cos, sin = self._angles(positions, x.dtype)
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        allowed = causal & mask[:, None, None, :]
        bias = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~allowed, torch.finfo(x.dtype).min)
        for weights, adapters in zip(self.layers, self.adapters, strict=True):
            if self.checkpointing:
                x = torch.utils.checkpoint.checkpoint(
                    self._layer, x, cos, sin, bias, weights, adapters, use_reentrant=False
                )
            else:
                x = self._layer(x, cos, sin, bias, weights, adapters)
        return self._norm(x, self.norm)

    def _angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.config.head_dim
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
        angles = positions[..., None].float() * self.config.rope_theta**-exponent
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _norm(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), scale, self.config.rms_norm_eps)

    def _layer(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bias: torch.Tensor,
        weights: Mapping[str, torch.Tensor], adapters: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:  # fmt: skip
        def project(name: str, y: torch.Tensor) -> torch.Tensor:
            out = F.linear(y, weights[name])
            if name in adapters:
                a, b = adapters[name]
                out = out + F.linear(F.linear(y, a.to(y.dtype)), b.to(y.dtype)) * self.hyper.lora_scale
            return out

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        def rotate(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat([-second, first], dim=-1) * sin

        y = self._norm(x, weights["input_layernorm"])
        q, k, v = (heads(project(name, y)) for name in ("q_proj", "k_proj", "v_proj"))
        grouped = k.shape[1] != q.shape[1]
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=bias, enable_gqa=grouped)
        x = x + project("o_proj", attended.transpose(1, 2).flatten(2))
        y = self._norm(x, weights["post_attention_layernorm"])
        return x + project("down_proj", F.silu(project("gate_proj", y)) * project("up_proj", y))


def to_torch(batch: Any, device: str) -> dict[str, torch.Tensor]:
    """A `TrainBatch` as torch tensors; token ids become int64."""
    found = {}
    for name, leaf in batch._asdict().items():
        if leaf is None:  # of an option that is off
            continue
        if str(leaf.dtype) == "bfloat16":
            tensor = torch.tensor(np.asarray(leaf, np.float32)).bfloat16()
        else:
            tensor = torch.tensor(np.asarray(leaf))
        found[name] = (tensor.long() if tensor.dtype == torch.int32 else tensor).to(device)
    return found
