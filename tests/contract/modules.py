"""Small LightningModules that stand for what users bring."""

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from forge_lightning.core.stateful_loader import StatefulDataLoader
from forge_lightning.edge.sampler import DifficultySampler
from forge_lightning.sandbox import Task


def examples(count=64):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 0).long())


@dataclass
class Problem:
    """Passed from the second epoch on."""

    task_id: str
    prompt: str = ""
    solution: str = "epoch = 1"

    def task(self, completion):
        return Task(completion, "assert epoch > 0", "epoch")


class LossOnly(LightningModule):
    """`training_step` returns a bare loss tensor."""

    warns = "(?!)"  # of what the module itself does

    def complete(self, prompts, **options):
        return [f"epoch = {self.current_epoch}"] * len(prompts)

    def problems(self, split):
        return [Problem("a"), Problem("b")]

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 2))

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.to(self.dtype)), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(examples(), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class ExtraOutputs(LossOnly):
    """`training_step` returns a dict whose extras still carry the graph."""

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        return {"loss": nn.functional.cross_entropy(logits, batch[1]), "logits": logits}


class SkipsSteps(LossOnly):
    """`training_step` returns `None` at the first call and every other one behind it."""

    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        return None if self.calls % 2 else self.loss(batch)


class TwoOptimizers(LossOnly):
    """Manual optimization, two optimizers, alternating."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[3].parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        for opt in self.optimizers():
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            opt.step()


class UnfreezesLate(LossOnly):
    """A parameter gets its first gradient after training began."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 3:
            self.net[0].requires_grad_(True)


class PartlyFrozen(LossOnly):
    """Some parameters never get a gradient."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)


class Checkpointed(LossOnly):
    """Activations are computed once more in the backward pass: every forward hook sees each batch twice."""

    def loss(self, batch):
        x, y = batch
        logits = checkpoint(self.net, x.to(self.dtype).requires_grad_(), use_reentrant=False)
        return nn.functional.cross_entropy(logits, y)


class Tied(LossOnly):
    """Two layers are one parameter."""

    def __init__(self):
        super().__init__()
        self.net[0], self.net[3] = nn.Linear(8, 8), nn.Linear(8, 8)
        self.net[3].weight = self.net[0].weight


class Compiled(LossOnly):
    """The network is compiled; "aot_eager" needs no compiler on the machine."""

    warns = "The .grad attribute of a Tensor that is not a leaf"  # the compiler's own look at tensors, muted by it

    def __init__(self):
        super().__init__()
        self.net.compile(backend="aot_eager")


class Adversarial(LossOnly):
    """A generator and a discriminator, which is `net`, by turns."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        net = self.net
        del self.net
        self.generator, self.net = nn.Linear(4, 8), net  # in this order: the last layer is the discriminator's

    def configure_optimizers(self):
        return torch.optim.Adam(self.generator.parameters(), 0.01), torch.optim.Adam(self.net.parameters(), 0.01)

    def training_step(self, batch, batch_idx):
        real, of_generator, of_net = batch[0].to(self.dtype), *self.optimizers()
        noise = torch.randn(len(real), 4, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)
        for optimizer in (of_generator, of_net):
            self.toggle_optimizer(optimizer)
            made, true = self.generator(noise), torch.ones(len(real), dtype=torch.long, device=self.device)
            if optimizer is of_generator:
                loss = nn.functional.cross_entropy(self.net(made), true)
            else:
                loss = nn.functional.cross_entropy(self.net(real), true)
                loss = loss + nn.functional.cross_entropy(self.net(made.detach()), 1 - true)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


class LowRank(LossOnly):
    """LoRA by `peft`: what was there is frozen, and two layers learn a change of rank 2."""

    def __init__(self):
        super().__init__()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights="gaussian"), self.net)


class Plain(LossOnly):
    """Deterministic given the batches: no dropout, SGD. For equalities between runs."""

    batch_size = 8

    def __init__(self):
        super().__init__()
        self.net[1] = nn.Identity()

    def train_dataloader(self):
        return DataLoader(examples(), batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sharded(Plain):
    """The same under FSDP2, where the weights are sharded in `configure_model`."""

    def configure_model(self):
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def with_batches_of(size, base=Plain):
    return type(f"{base.__name__}{size}", (base,), {"batch_size": size})


class Stateful(LossOnly):
    """Dropout, and a loader of ours: resumable inside an epoch."""

    def train_dataloader(self):
        return StatefulDataLoader(examples(), batch_size=8, shuffle=True, seed=3)


class RaisesAtStep(LossOnly):
    """Fails in the middle of an epoch."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("raised on purpose")
        return self.loss(batch)


FOREIGN = [
    *(LossOnly, ExtraOutputs, SkipsSteps, TwoOptimizers, UnfreezesLate, PartlyFrozen),
    *(Checkpointed, Tied, Compiled, Adversarial, LowRank),
]


class Graphs:
    """A batch as graph libraries have it: one large graph, and which node belongs to which example."""

    def __init__(self, nodes, of, y):
        self.nodes, self.of, self.y = nodes, of, y

    @classmethod
    def collate(cls, pairs):
        return cls(
            torch.cat([x.view(2, 4) for x, _ in pairs]),
            torch.arange(len(pairs)).repeat_interleave(2),
            torch.stack([y for _, y in pairs]),
        )

    def to(self, device, **kwargs):
        return Graphs(*(t.to(device, **kwargs) for t in (self.nodes, self.of, self.y)))


class OfGraphs(Plain):
    """Batches of a class, a list of metrics with more entries than the network has layers, and an empty one."""

    collate = staticmethod(Graphs.collate)

    def __init__(self):
        super().__init__()
        self.net[0] = nn.Linear(4, 16)
        self.metrics = nn.ModuleList([MeanMetric() for _ in range(9)])
        self.val_metrics = nn.ModuleList()

    def forward(self, graphs):
        nodes = self.net(graphs.nodes.to(self.dtype))
        return nodes.new_zeros(len(graphs.y), nodes.shape[-1]).index_add(0, graphs.of, nodes)

    def loss(self, batch):
        loss = nn.functional.cross_entropy(self(batch), batch.y)
        self.metrics[0].update(loss.detach())
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), batch_size=self.batch_size)

    def train_dataloader(self):
        return DataLoader(examples(), batch_size=self.batch_size, collate_fn=self.collate)

    val_dataloader = train_dataloader


class Nested(OfGraphs):
    """Nested dicts with lists in them, a network that is called by `forward`, and outputs as a class."""

    @dataclass
    class Output:
        loss: torch.Tensor
        logits: torch.Tensor

    @staticmethod
    def collate(pairs):
        x, y = torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
        return {"inputs": {"parts": [x[:, :4], x[:, 4:]], "names": ["a"] * len(x)}, "target": (y, None)}

    def forward(self, inputs):
        return self.net.forward(sum(inputs["parts"]).to(self.dtype))

    def loss(self, batch):
        logits = self.forward(batch["inputs"])
        return self.Output(nn.functional.cross_entropy(logits, batch["target"][0]), logits).loss


class Given(Plain):
    """Its network is a hyperparameter, which every checkpoint holds then."""

    def __init__(self, net=None):
        super().__init__()
        net = net or self.net
        self.save_hyperparameters({"net": net}, logger=False)
        self.net = net


class Regression(Plain):
    """One number for each example, as its target is."""

    def __init__(self):
        super().__init__()
        self.net[3] = nn.Linear(16, 1)

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def train_dataloader(self):
        x = examples().tensors[0]
        return DataLoader(TensorDataset(x, x.mean(1)), batch_size=self.batch_size)

    val_dataloader = train_dataloader


class Binary(Plain):
    """One logit for two classes, and boolean labels."""

    def __init__(self):
        super().__init__()
        self.net[3] = nn.Linear(16, 1)

    def loss(self, batch):
        logits = self.net(batch[0])[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logits, (batch[1] > 0).to(logits))


class Dummy(Plain):
    """Steps an optimizer of its own, as Pyro's modules do; Lightning knows one of a parameter without a gradient."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.dummy = nn.Parameter(torch.zeros(1))

    def configure_optimizers(self):
        self.own = torch.optim.SGD(self.net.parameters(), 0.1)
        return torch.optim.SGD([self.dummy], 0.1)

    def training_step(self, batch, batch_idx):
        self.own.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.own.step()
        self.optimizers().step()
        return loss.detach()


SHAPES = [OfGraphs, Nested, Given, Regression, Binary, Dummy]
"""Of other people's projects; a callback works with them, or refuses at the start."""


def with_choices(base):
    """The module with a `DifficultySampler` in its training loader, and a loss to tell under manual optimization."""

    class Chooses(base):
        def train_dataloader(self):
            loader = super().train_dataloader()
            difficulty = loader.dataset.tensors[0][:, 0]
            sampler = DifficultySampler(loader.dataset, difficulty, batch_size=loader.batch_size, seed=3)
            options = {"batch_size": loader.batch_size, "collate_fn": loader.collate_fn}
            return type(loader)(loader.dataset, sampler=sampler, **options)

        def training_step(self, batch, batch_idx):
            returned = super().training_step(batch, batch_idx)
            manual = returned is None and not self.automatic_optimization
            return {"loss": self.loss(batch).detach()} if manual else returned

    Chooses.__name__ = base.__name__
    return Chooses
