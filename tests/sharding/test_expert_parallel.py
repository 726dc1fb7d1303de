from __future__ import annotations

import functools

import lightning
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_plugin import LossFreeBalancing, Sign, shard_
from moe_plugin.apps.models.clipping import clip_gradients_
from moe_plugin.attach.balanced_model import find_balanced
from tests.apps.models.small_models import VOCAB_SIZE, language_model
from tests.sharding.ranks import loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]
STEPS = 50


def ours() -> nn.Module:
    return language_model().network


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, intermediate_size=8, use_cache=False,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def deepseek_v3() -> nn.Module:
    """Without shared experts it has parameters without elements all the same."""
    from transformers import DeepseekV3Config

    from moe_plugin.apps.models.hugging_face import HuggingFaceNetwork
    from moe_plugin.experts import ExpertShape

    config = DeepseekV3Config(
        vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=0, n_group=1,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_shared_experts=0, use_cache=False,
    )  # fmt: skip
    return HuggingFaceNetwork(config, None, ExpertShape(num_experts=4, top_k=2, hidden_dim=8))


class Project(lightning.LightningModule):
    """A user's own project: it knows `shard_`, the callback and `clip_gradients_`."""

    def __init__(self, make, expert_parallel_size: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = make()
        self.expert_parallel_size = expert_parallel_size
        self.losses = []
        self.counts = []

    def configure_model(self):
        if self.device_mesh is not None:
            shard_(self.model, self.device_mesh, expert_parallel_size=self.expert_parallel_size)

    def training_step(self, batch, batch_idx):
        output = self.model(batch[:, :-1])
        logits_BSV = output[0] if isinstance(output, tuple) else output.logits
        loss = nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *_):
        self.counts.append([counts_E.tolist() for counts_E in find_balanced(self).record.counts.values()])

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        clip_gradients_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(rank, make, kind, size=1, *, steps=STEPS, epochs=1, save=None, resume=None, **settings):
    """Trains on the same global batches whatever the ranks, and returns what came of it."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCAB_SIZE, (4, 9), generator=generator) for _ in range(steps)]
    project, callbacks = Project(make, size), [LossFreeBalancing(Sign(rate=0.01))]
    run = trainer(kind, max_epochs=epochs, gradient_clip_val=0.5, callbacks=callbacks, **settings)
    run.fit(project, loader(batches, rank, run.world_size), ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    experts = [p for p in project.parameters() if p.ndim == 3]
    return {
        "biases": [site.bias.tolist() for site in find_balanced(project).values()],
        "counts": project.counts,
        "losses": project.losses,
        "weights": {name: whole(p) for name, p in project.model.named_parameters()},
        "own_experts": [len(p.to_local()) if isinstance(p, DTensor) else len(p) for p in experts],
    }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def fit_on_rank(rank, results, *arguments, **settings):
    results[rank] = fit(rank, *arguments, **settings)


def assert_same_weights(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        torch.testing.assert_close(weight, expected[name], atol=tolerance, rtol=0)


class TestFit:
    @pytest.mark.parametrize(
        ("make", "ranks"),
        [(ours, 2), (mixtral, 2), (deepseek_v3, 2), pytest.param(ours, 4, marks=pytest.mark.slow)],
    )
    def test_fifty_steps_have_the_counts_biases_and_losses_of_one_process(self, on_ranks, make, ranks):
        alone = fit(0, make, "single")
        results = on_ranks(ranks, fit_on_rank, make, "fsdp", 2)
        for result in results.values():
            assert result["counts"] == alone["counts"]
            assert result["biases"] == alone["biases"]
            assert_same_weights(result["weights"], alone["weights"], 1e-4)
            assert set(result["own_experts"]) == {2}
        assert any(any(bias) for bias in alone["biases"])
        losses = torch.tensor([result["losses"] for result in results.values()]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(alone["losses"]), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_half_precision_stays_close_to_one_process(self, on_ranks, precision):
        fit_briefly = functools.partial(fit_on_rank, steps=5, precision=precision)
        results = on_ranks(2, fit_briefly, ours, "fsdp", 2)
        alone = fit(0, ours, "single", steps=5, precision=precision)
        losses = torch.tensor([result["losses"] for result in results.values()]).mean(0)
        # Two steps of bf16 between 2 and 4, in which the losses come.
        torch.testing.assert_close(losses, torch.tensor(alone["losses"]), atol=2 / 64, rtol=0)
        assert results[0]["biases"] == results[1]["biases"]
        assert any(any(bias) for bias in results[0]["biases"])


class TestCheckpoints:
    def test_layouts_go_on_from_each_other_and_from_themselves_bit_for_bit(self, on_ranks, tmp_path):
        single, ep = tmp_path / "single.ckpt", tmp_path / "ep.ckpt"
        fit(0, ours, "single", steps=4, save=single)
        reference = fit(0, ours, "single", steps=4, epochs=2)
        results = on_ranks(2, _exchange_checkpoints_on_rank, single, ep)
        for result in results.values():
            assert result["from_ep"]["losses"] == result["through"]["losses"][4:]
            assert_same_weights(result["from_ep"]["weights"], result["through"]["weights"], 0)
        others = [results[0]["from_single"], fit(0, ours, "single", steps=4, epochs=2, resume=ep)]
        for other in others:
            assert other["biases"] == reference["biases"]
            assert_same_weights(other["weights"], reference["weights"], 1e-5)


def _exchange_checkpoints_on_rank(rank, results, single, ep):
    fit(rank, ours, "fsdp", 2, steps=4, save=ep)
    results[rank] = {
        "through": fit(rank, ours, "fsdp", 2, steps=4, epochs=2),
        "from_ep": fit(rank, ours, "fsdp", 2, steps=4, epochs=2, resume=ep),
        "from_single": fit(rank, ours, "fsdp", 2, steps=4, epochs=2, resume=single),
    }
