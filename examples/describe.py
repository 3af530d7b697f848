"""The map of a model: units per layer, how much is shared, and which parameters have a copy per task and why."""

import timm

import hatcl

model = timm.create_model("hat_test_vit", num_tasks=3, num_classes=10)
description = hatcl.describe(model)
print(description)
for name, why in description.copies.items():
    print(f"copy per task: {name} ({why})")

entry = model.hat_gates.unit_map.entries["blocks.0.attn.qkv.weight"]
for factor in entry.factors:
    side = "writes" if factor.owner else "reads"
    print(f"{entry.name} {list(entry.shape)}: dimension {factor.axis} {side} units {factor.units[:4]} ...")
print({name: f"{share:.1%}" for name, share in description.to_dict()["shares"].items()})
