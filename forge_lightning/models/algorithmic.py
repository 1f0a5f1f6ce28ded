"""A small reference model: the two-layer decoder of the Grokfast paper."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from forge_lightning.core.protocols import SupportsTokens
from forge_lightning.models.optimizers import optimizer_config


class Block(nn.Module):
    """A decoder block whose residual stream starts at the normalised input, as published.

    Args:
        dim: Width ``D``.
        num_heads: Attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1 = nn.LayerNorm(dim)
        self.ln_2 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)  # its parameters and their initialisation
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, last_only: bool = False) -> Tensor:
        """``(B, T, D)`` to the same, or to ``(B, 1, D)``: the last position alone."""
        x = self.ln_1(x)
        q = x[:, -1:] if last_only else x
        weight, bias, dim = self.attn.in_proj_weight, self.attn.in_proj_bias, x.shape[-1]
        query = F.linear(q, weight[:dim], bias[:dim])
        key, value = F.linear(x, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        q_heads, k_heads, v_heads = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        mixed = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, is_causal=not last_only)
        x = q + self.attn.out_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Decoder(nn.Module):
    """Two-layer causal transformer of the Grokfast paper, evaluated at the last position only.

    The last position's logits need no other position of the last block; leaving those out changes no number.

    Args:
        num_tokens: Vocabulary size ``V``.
        seq_len: Longest sequence, for the position embeddings.
        dim: Width ``D``.
        num_layers: Blocks.
        num_heads: Attention heads.

    References:
        Lee et al., `Grokfast <https://arxiv.org/abs/2405.20233>`_, 2024, algorithmic data. Modules are created in the
        order of the authors' code, so that a seed gives the same initial weights.
    """

    def __init__(self, num_tokens: int, seq_len: int, dim: int = 128, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(num_tokens, dim)
        self.position_embeddings = nn.Embedding(seq_len, dim)
        self.layers = nn.ModuleList(Block(dim, num_heads) for _ in range(num_layers))
        self.ln_f = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_tokens, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the token after the last one: ``(B, T)`` to ``(B, V)``."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_embeddings(input_ids) + self.position_embeddings(positions)
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x, last_only=depth == len(self.layers))
        logits: Tensor = self.head(self.ln_f(x[:, -1]))
        return logits


@torch.no_grad()
def scale_initial_weights(model: Decoder, embedding_scale: float = 1.0, weight_scale: float = 1.0) -> None:
    """Multiply the embeddings, and the matrices of the blocks, in place."""
    for embedding in (model.token_embeddings, model.position_embeddings):
        embedding.weight.mul_(embedding_scale)
    for param in model.layers.parameters():
        if param.ndim == 2:
            param.mul_(weight_scale)


class AlgorithmicModule(LightningModule):
    """The Grokfast paper's decoder on tasks with one answer token, as `AlgorithmicData` gives them.

    Steps return ``loss``, and per example ``example_loss``, ``example_success`` and
    ``example_log_likelihood``, ``(B,)``, detached.
    Logs ``train/loss``, ``train/accuracy``, ``val/loss`` and ``val/accuracy``.

    Args:
        dim: Width of the decoder.
        num_layers: Blocks.
        num_heads: Attention heads; divides ``dim``.
        embedding_scale: Factor on the initial embeddings. Below 1 (as 0.02) a model generalises sooner.
        weight_scale: Factor on the initial matrices of the blocks, their biases and norms apart.
        optimizer: Optimizer, from parameters.
        lr_scheduler: Learning-rate schedule, stepped after every optimizer step.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        embedding_scale: float = 1.0,
        weight_scale: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"`AlgorithmicModule(num_heads={num_heads})` must divide dim={dim}.")
        self.dim, self.num_layers, self.num_heads = dim, num_layers, num_heads
        self.embedding_scale, self.weight_scale = embedding_scale, weight_scale
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.model: Decoder | None = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, SupportsTokens):
            raise MisconfigurationException(
                "`AlgorithmicModule` takes its vocabulary from the datamodule, which must have `num_tokens` and"
                f" `seq_len`, as `AlgorithmicData` does; got {type(data).__name__}."
            )
        self.model = Decoder(data.num_tokens, data.seq_len, self.dim, self.num_layers, self.num_heads)
        scale_initial_weights(self.model, self.embedding_scale, self.weight_scale)
        self.train_accuracy = MulticlassAccuracy(data.num_tokens, average="micro", validate_args=False)
        self.val_accuracy = MulticlassAccuracy(data.num_tokens, average="micro", validate_args=False)
        self.val_loss = MeanMetric()

    def forward(self, input_ids: Tensor) -> Tensor:
        """``(B, T)`` to the logits of the next token, ``(B, V)``."""
        assert self.model is not None
        logits: Tensor = self.model(input_ids)
        return logits

    def _step(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        logits = self(batch["input_ids"])
        example_loss = F.cross_entropy(logits, batch["target"], reduction="none")
        success = (logits.argmax(-1) == batch["target"]).float()
        return {
            "loss": example_loss.mean(),
            "example_loss": example_loss.detach(),
            "example_success": success,
            "example_log_likelihood": -example_loss.detach(),
        }, logits.detach()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        outputs, logits = self._step(batch)
        self.train_accuracy(logits, batch["target"])
        self.log("train/loss", outputs["loss"], prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return outputs

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        outputs, logits = self._step(batch)
        self.val_accuracy(logits, batch["target"])
        self.val_loss(outputs["example_loss"])
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        self.log("val/accuracy", self.val_accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return outputs

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        answers: Tensor = self(batch["input_ids"]).argmax(-1)
        return answers

    def configure_optimizers(self) -> Any:
        steps = lambda: self.trainer.estimated_stepping_batches  # noqa: E731
        return optimizer_config(self.parameters(), self.optimizer, self.lr_scheduler, steps)
