"""Makes trl-losses.safetensors beside this file: what TRL's GKD loss says of random logits, and its gradients.

    PEER/bin/python make_trl_losses.py     (TRL 1.16)

student, teacher: logits [B, T, V]; labels [B, T]. cases [N, 3]: beta, temperature, and 1 where positions with the label
-100 are left out, 0 where all count. losses [N]; gradients [N, B, T, V], with respect to the student's logits.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from trl.experimental.gkd import GKDTrainer

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (0.7, 1.0, 2.5)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3.0 * torch.randn(2, 6, 19, generator=generator) for _ in range(2))
    student[0, 0, 3], teacher[0, 1, 4] = -80.0, 60.0  # a token that is ruled out, and one that is certain
    labels = torch.randint(0, 19, (2, 6), generator=generator)
    labels[0, :2] = labels[1, 4:] = -100
    cases = [(beta, heat, float(masked)) for beta in BETAS for heat in TEMPERATURES for masked in (False, True)]
    losses, gradients = [], []
    for beta, temperature, masked in cases:
        given = student.clone().requires_grad_()
        wanted = labels if masked else torch.zeros_like(labels)
        loss = GKDTrainer.generalized_jsd_loss(given, teacher, wanted, beta=beta, temperature=temperature)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(given.grad)
    found = {"student": student, "teacher": teacher, "labels": labels, "cases": torch.tensor(cases)}
    found |= {"losses": torch.stack(losses), "gradients": torch.stack(gradients)}
    save_file(found, Path(__file__).with_name("trl-losses.safetensors"))


if __name__ == "__main__":
    main()
