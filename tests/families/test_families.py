"""Every transformers family with routed experts is verified or refused with a reason, as docs/models.md lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.families.__main__ import check_the_default_rule
from tests.families.models import families
from tests.families.survey import surveyed

TABLE = Path(__file__).parents[2] / "docs" / "models.md"


# Many modules around routers of other families: 8 to 53 s each, eight minutes together.
LARGE = (
    *("deepseek_ocr2", "diffusion_gemma", "ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "hy_v4_vl", "inkling"),
    *("inkling2_loop", "mistral_large4", "muse_spark", "nemotron3_5_transcribe", "qwen3_omni_moe"),
    *(
        "axk2",
        "deepseek_v32",
        "dots3_note",
        "glm_moe_dsa",
        "hy_v4",
        "inkling2",
        "minimax_m3_vl",
        "openai_privacy_filter",
    ),
    *("qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp", "step3p7"),
    "unlimited_ocr",
)


def _marked(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.slow) if family in LARGE else family


class TestFamilies:
    @pytest.mark.parametrize("family", [_marked(family) for family in families()])
    def test_family_is_verified_or_refused_as_the_table_says(self, family):
        assert str(surveyed(family)) in TABLE.read_text().splitlines()

    @pytest.mark.parametrize(
        "family", ["deepseek_v3", "nllb_moe", "phimoe"]
    )  # `python -m tests.families`: all
    def test_default_rule_balances_the_family(self, family):
        check_the_default_rule(family)

    def test_table_holds_every_family_and_all_but_one_are_verified(self):
        page = TABLE.read_text()
        rows = re.findall(r"^\| (\w+) \|.*\| (verified|refused)", page, re.MULTILINE)
        assert [family for family, _ in rows] == families()
        # The caller of VitPose names the expert, so it has no router.
        assert [family for family, result in rows if result == "refused"] == ["vitpose_backbone"]
        assert f"{len(rows)} of them: {len(rows) - 1} verified, 1 refused" in page
