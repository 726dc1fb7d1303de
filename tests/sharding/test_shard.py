from __future__ import annotations

import lightning
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moe_plugin import LossFreeBalancing, Sign, balance_, shard_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.errors import AttachError, ConfigError
from moe_plugin.losses import LoadBalancingLoss
from moe_plugin.sharding import find_layers
from tests.apps.models.small_models import language_model, token_batch
from tests.hosts import Host
from tests.sharding.ranks import loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]


class TestGradients:
    @pytest.mark.parametrize("mode", [None, "reentrant", "non_reentrant"])
    def test_two_ranks_have_the_gradients_of_one(self, on_ranks, mode):
        results = on_ranks(2, gradients_on_rank, mode)
        expected = results[0]["single"]
        for rank in range(2):
            assert results[rank]["sharded"].keys() == expected.keys()
            for name, gradient in results[rank]["sharded"].items():
                torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def gradients_on_rank(rank, results, mode):
    torch.manual_seed(0)
    model = language_model(activation_checkpointing=mode, auxiliary_loss=LoadBalancingLoss(0.1))
    batches = [token_batch(2), token_batch(2)]
    for batch in batches:
        (sum(model._losses(batch)) / 2).backward()
    single = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for _ in range(2):  # Lightning calls configure_model once per stage.
        shard_(
            model.network,
            init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel")),
        )
    assert all(isinstance(layer, FSDPModule) for layer in model.network.layers)
    sum(model._losses(batches[rank])).backward()
    sharded = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    results[rank] = {"single": single, "sharded": sharded}


class TestUnits:
    def test_hand_written_and_unrepeated_models(self, on_ranks):
        assert on_ranks(2, units_on_rank)[0] == {"host": [True, True, True], "plain": [True]}

    def test_what_cannot_be_sharded_is_named(self, on_ranks):
        messages = on_ranks(2, refusals_on_rank)[0]
        network = "'model' must be the network that training_step calls, got 'HostProject'. Pass the module"
        assert messages[0].startswith(network)
        mesh = "'mesh' must have one dimension or one named 'data_parallel', got DeviceMesh("
        assert messages[1].startswith(mesh)


def units_on_rank(rank, results):
    mesh, host, plain = init_device_mesh("cpu", (2,)), Host(), nn.Linear(2, 2)
    for model in (host, plain):
        shard_(model, mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    units = {"host": [host, *host.layers], "plain": [plain]}
    results[rank] = {name: [isinstance(m, FSDPModule) for m in modules] for name, modules in units.items()}
    dist.barrier()


def refusals_on_rank(rank, results):
    messages = []
    named = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    for model, mesh in ((HostProject(), init_device_mesh("cpu", (2,))), (Host(), named)):
        with pytest.raises(ConfigError) as caught:
            shard_(model, mesh)
        messages.append(str(caught.value))
    results[rank] = messages
    dist.barrier()  # a rank that leaves early takes the store with it


class HostProject(lightning.LightningModule):
    """A user's project that knows of moe_plugin what its documentation says: `shard_` and the callback."""

    def __init__(self, make=Host):
        super().__init__()
        torch.manual_seed(0)
        self.model = make()
        self.losses = []

    def configure_model(self):
        if self.device_mesh is not None:
            shard_(self.model, self.device_mesh)

    def training_step(self, batch, batch_idx):
        output = self.model(batch)
        logits = getattr(output, "logits", output)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def qwen3_moe():
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, use_cache=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def ernie():
    """Its correction bias is a Parameter of shape (1, E) in a module of its own."""
    from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

    config = Ernie4_5_MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, moe_num_experts=4, moe_k=2, moe_intermediate_size=8, moe_layer_start_index=0,
        moe_num_shared_experts=0, use_cache=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


class TestShardedBias:
    def test_of_a_model_sharded_by_hand_is_refused_with_the_fix(self, on_ranks):
        pytest.importorskip("transformers")
        message = on_ranks(2, sharded_bias_on_rank)[0]
        assert "'e_score_correction_bias' of router" in message
        assert "Shard the model by moe_plugin.shard_" in message


def sharded_bias_on_rank(rank, results):
    model, mesh = ernie(), init_device_mesh("cpu", (2,))
    for unit in [*find_layers(model), model]:
        fully_shard(unit, mesh=mesh)
    with pytest.raises(AttachError) as caught:
        balance_(model)
    results[rank] = str(caught.value)
    dist.barrier()


class TestUsersProject:
    @pytest.mark.parametrize("make", [Host, qwen3_moe, ernie])
    def test_two_sharded_ranks_have_the_biases_and_losses_of_one(self, make, on_ranks):
        if make is not Host:
            pytest.importorskip("transformers")
        alone = {}
        fit_project(0, alone, make, "single")
        sharded = on_ranks(2, fit_project, make, "fsdp")
        assert sharded[0]["biases"] == sharded[1]["biases"] == alone[0]["biases"]
        assert any(any(bias) for bias in alone[0]["biases"])
        mean = torch.tensor([sharded[0]["losses"], sharded[1]["losses"]]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(alone[0]["losses"]), atol=1e-6, rtol=1e-6)


def fit_project(rank, results, make, kind):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 32, (4, 8), generator=generator) for _ in range(6)]
    project = HostProject(make)
    run = trainer(kind, max_epochs=1, callbacks=[LossFreeBalancing(Sign(rate=0.01))])
    run.fit(project, loader(batches, rank, run.world_size))
    sites = find_balanced(project).values()
    results[rank] = {"biases": [site.bias.tolist() for site in sites], "losses": project.losses}
