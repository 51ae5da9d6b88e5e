"""A Wan transformer of diffusers through the whole trainer: shards, rCM, a stop, export, a scheduler of diffusers."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import save_file

from jvpgraph.trainer import settings
from jvpgraph.trainer.config import RunConfig
from jvpgraph.trainer.evaluation.samplers import few_step_times
from jvpgraph.trainer.export import export_run
from jvpgraph.trainer.model.adapters import diffusers_model
from jvpgraph.trainer.model.schedulers import scheduler_for
from jvpgraph.trainer.run.finished import load_run
from jvpgraph.trainer.run.log import RunLog
from jvpgraph.trainer.train import train
from tests.test_train import content, last_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

WAN = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}
LATENT, TEXT = (4, 3, 6, 8), (5, 16)


def write_data(folder: Path, samples: int = 12) -> None:
    """A shard in webdataset's layout, and the embedding of a negative prompt."""
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "wan-000000.tar")) as shard:
        for i in range(samples):
            latent, text = (rng.standard_normal(shape, dtype=np.float32) for shape in (LATENT, TEXT))
            shard.write({"__key__": f"{i:06d}", "latents.npy": latent, "prompt.npy": text})
    save_file({"encoder_hidden_states": torch.zeros(TEXT)}, folder / "negative.safetensors")


def configuration(out: Path, data: Path) -> RunConfig:
    file = out.parent / f"{out.name}.yaml"
    file.write_text(f"""
out: {out}
threads: 1
device: cpu
model:
  load: jvpgraph.trainer.adapters:diffusers_model
  options: {{name: WanTransformer3DModel, dtype: bfloat16, config: {WAN}}}
student: {{backend: eager, checkpoint_blocks: true}}
guidance: {{scale: 5.0, negative_file: {data}/negative.safetensors}}
data:
  source:
    load: jvpgraph.trainer.data.shards:webdataset
    options:
      urls: "{data}/wan-{{000000..000000}}.tar"
      latents: latents.npy
      conditions: {{prompt.npy: encoder_hidden_states}}
stages:
  - objective: {{name: rcm, scm: {{tangent_warmup: 4}}, dmd: {{fake_updates_per_step: 1}}}}
    steps: 20
    batch: 4
    student: {{lr: 1.0e-4}}
    fake: {{lr: 1.0e-4}}
checkpoint: {{every: 8, keep: 2}}
log: {{every: 1}}
""")
    return settings.load(RunConfig, file)


@pytest.mark.long
def test_wan_from_shards_to_a_diffusers_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    whole = train(configuration(tmp_path / "whole", tmp_path))

    add = RunLog.add

    def interrupted(log: RunLog, step: int, *values: dict[str, float]) -> None:
        if step == 13:
            raise KeyboardInterrupt
        add(log, step, *values)

    config = configuration(tmp_path / "stopped", tmp_path)
    monkeypatch.setattr(RunLog, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(RunLog, "add", add)
    folder = train(config)
    expected, found = (content(last_checkpoint(run), tmp_path / "content.pt") for run in (whole, folder))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    out = export_run(folder, tmp_path / "net")
    net = diffusers.WanTransformer3DModel.from_pretrained(out, torch_dtype=torch.bfloat16)
    student = load_run(folder).student
    start = diffusers_model(name="WanTransformer3DModel", dtype="bfloat16", config=WAN).net.state_dict()
    for name, value in student.net.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert any(not torch.equal(start[name], value) for name, value in net.state_dict().items())

    sampling = scheduler_for(student, few_step_times(4, config.sampling))
    scheduler, rng = sampling.scheduler, torch.Generator().manual_seed(0)
    latents = sampling.noise_scale * torch.randn(2, *LATENT, generator=rng).to(net.dtype)
    text = torch.zeros(2, *TEXT, dtype=net.dtype)
    assert len(scheduler.timesteps) == 4
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = net(latents, t.expand(2), text, return_dict=False)[0]
            latents = scheduler.step(velocity, t, latents, generator=rng, return_dict=False)[0]
    assert latents.shape == (2, *LATENT)
    assert latents.isfinite().all()
