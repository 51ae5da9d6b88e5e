"""What people train with, small: stages and settings by name, for the tests that hold for all of them."""

from __future__ import annotations

from typing import Any

from tests.test_train import RCM, stage

STEPS = 4


def alone(objective: Any, **more: Any) -> dict[str, Any]:
    return {"stages": [stage(objective, STEPS)], **more}


def of_terms(*terms: dict[str, Any]) -> dict[str, Any]:
    return {"name": "terms", "terms": list(terms)}


DMD = {"name": "dmd", "fake_updates_per_step": 2}
CRITIC = {"name": "adversarial", "features": "fake_score", "width": 8, "blocks": [0]}
JUDGED = {"objective": CRITIC, "weight": 0.01}
SEGMENTS = {"name": "dcm", "teacher_steps": 8, "substeps": 2, "segments": 2}
LCM = {"name": "dcm", "jitter": True, "substeps": 2, "noise": 0.5, "target": "ema", "huber": 0.01}

RECIPES: dict[str, dict[str, Any]] = {
    "rcm": alone(RCM),
    "rcm, several scales": alone(
        RCM,
        guidance={"scale": [1.5, 3.0], "negative": {"labels": 10}},
        student={"backend": "eager", "embed_scale": True},
    ),
    "scm": alone("scm"),
    "scm, rf": alone({"name": "scm", "coordinates": "rf", "tangent_warmup": 2}),
    "sct": alone({"name": "scm", "velocity": "data"}),
    "tbcm": alone({"name": "scm", "points": "trajectory", "trajectory_steps": 2}),
    "dmd": alone(DMD),
    "dmd, fixed times": alone({**DMD, "fixed_times": [1.4, 1.2, 0.8], "guidance_times": {"name": "shifted_uniform"}}),
    "dmd, jumps": alone({**DMD, "rollout": "jumps"}),
    "dmd, a phase": alone({**DMD, "start": 1.2, "end": 0.4}),
    "dmd2": alone(of_terms({"objective": DMD}, {**JUDGED, "after": 1})),
    "f-distill": alone(of_terms({"objective": {**DMD, "divergence": "jensen_shannon"}}, {**JUDGED, "weight": 0})),
    "dmd and data": alone(of_terms({"objective": DMD}, {"objective": {"name": "data"}, "weight": 0.1})),
    "sana-sprint": alone(of_terms({"objective": {"name": "scm"}}, {"objective": {**CRITIC, "features": "teacher"}})),
    "dcm": alone("dcm"),
    "lcm": alone(LCM, guidance={"scale": 2.0, "interval": [0.1, 0.9], "negative": {"labels": 10}}),
    "dcm, segments": alone(SEGMENTS, sampling={"steps": [2]}),
    "mean_flow": alone("mean_flow"),
    "mean_flow, data": alone({"name": "mean_flow", "velocity": "data", "own_direction": 1.0, "guidance": 1.5}),
    "alphaflow": alone({"name": "mean_flow", "discrete": {"end": 3, "first": 0.5}, "clean_share": 0.2}),
    "flow_map, eulerian": alone({"name": "flow_map", "tangent_warmup": 2}),
    "flow_map, lagrangian": alone(
        {"name": "flow_map", "method": "lagrangian", "longest": 0.5, "clean_share": 0.0}, sampling={"steps": [2]}
    ),
    "flow_map, terminal": alone({"name": "flow_map", "method": "terminal"}),
    "flow_map, own": alone({"name": "flow_map", "velocity": "own"}),
    "free_flow": alone("free_flow", sampling={"steps": [1]}),
    "flow_matching": alone("flow_matching"),
    "dcm, scm, dmd and scm": {
        "stages": [
            stage("dcm", 1),
            stage("scm", 1),
            stage(of_terms({"objective": {"name": "scm"}}, {"objective": DMD, "weight": 0.1}), STEPS - 2),
        ]
    },
    "flow map, then dmd on its jumps": {
        "stages": [stage("flow_map", STEPS // 2), stage({**DMD, "rollout": "jumps"}, STEPS // 2)],
        "student": {"backend": "eager", "second_time": True},
    },
}

THROUGH_TANGENT = {"flow_map, terminal"}  # in one process
