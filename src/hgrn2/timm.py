"""Register the image models with timm: after `import hgrn2.timm`, `timm.create_model("hgrn2_vit_tiny")` makes one."""

from hgrn2.extras import install_command
from hgrn2.models.vision.timm_registry import register_with_timm

MODELS = register_with_timm()
"""Names of the models."""

if not MODELS:
    raise ModuleNotFoundError(f"timm cannot be imported: {install_command('timm')}", name="timm")
