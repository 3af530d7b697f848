"""The pieces of timm's own training script: layer decay, mixup, gradient scaler, averaged weights, checkpoints.

Needs scikit-learn: pip install -e '.[data]'
"""

import tempfile

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

import hatcl
from hatcl.data.images import Images, Preparation, digits_tasks

torch.manual_seed(0)
model, epochs = timm.create_model("hat_test_vit", num_tasks=2, num_classes=2, img_size=32, patch_size=8), 4
for task, digits in enumerate(digits_tasks()[:2]):
    batches = Images(digits.x_train, digits.y_train, Preparation.of(digits, size=32)).batches(64, shuffle=True)
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.75)
    rates, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=1)
    scaler, mixup, ema = NativeScaler("cpu"), Mixup(mixup_alpha=0.2, num_classes=2), ModelEmaV3(model, decay=0.95)
    folder = tempfile.mkdtemp()
    saver = CheckpointSaver(model, optimizer, model_ema=ema, amp_scaler=scaler, checkpoint_dir=folder, max_history=1)
    with hatcl.learn(model, task, optimizer, steps=epochs * len(batches)) as learning:
        for epoch in range(epochs):
            for x, y in batches:
                x, y = mixup(x[: len(x) // 2 * 2], y[: len(y) // 2 * 2])  # mixup wants an even number
                loss = SoftTargetCrossEntropy()(model.train()(x), y) + learning.penalty()
                optimizer.zero_grad()
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
                ema.update(model)
            rates.step(epoch + 1)
            saver.save_checkpoint(epoch, metric=-loss.item())
    hatcl.seal(ema.module)  # the averaged copy has the task as well, and earlier tasks bit for bit
print(hatcl.certify(ema.module, x[:8], strict=True))
