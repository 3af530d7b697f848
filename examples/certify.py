"""The proof: overwrite everything that is not a task's own with large random values; its logits must not move by a bit.
And the counter-proof: whatever writes to a sealed task from outside is found out and named."""

import timm
import torch
from torch.nn import functional as F

import hatcl

torch.manual_seed(0)
images = torch.randn(16, 3, 32, 32)
model = timm.create_model("hat_test_vit", num_tasks=2, num_classes=2, img_size=32, patch_size=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
for t in range(2):
    y = (images[:, t].mean((1, 2)) > 0).long()
    with hatcl.learn(model, task=t, optimizer=optimizer, steps=20) as learning:
        for _ in range(20):
            loss = F.cross_entropy(model(images), y) + learning.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

certificate = hatcl.certify(model, images, strict=True)  # strict: raise instead of reporting
print(certificate)
print("largest difference per task:", certificate.max_abs_diff)

with torch.no_grad():  # someone writes to the weights
    dict(model.named_parameters())["blocks.0.mlp.fc1.weight"].add_(1e-3)
try:
    hatcl.certify(model, images)
except hatcl.IntegrityError as error:
    print("found out:", error)
