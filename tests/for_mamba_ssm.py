"""A script as people write it for mamba-ssm; .ci/run starts it by ``python -m dualform.compat`` from a wheel."""

import mamba_ssm
import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

print(mamba_ssm.__version__)
torch.manual_seed(0)
model = MambaLMHeadModel(MambaConfig(d_model=32, n_layer=2, vocab_size=50))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.randint(50, (2, 33))
losses = []
for _ in range(3):
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("losses", *(f"{loss:.3f}" for loss in losses))
if not losses[0] > losses[1] > losses[2]:
    raise SystemExit("the loss did not fall")
print("generated", model.generate(tokens[:1, :5], max_length=10).tolist())
