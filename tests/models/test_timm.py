"""Timm's own parts train, validate and take apart the registered models, as its train.py and validate.py do."""

import importlib.util
import sys
import warnings

import pytest
import torch

from tests.data import image_files as files


@pytest.fixture(scope="module")
def timm():
    """Return timm, also beside a torchvision that was built for CUDA and has no operators on this machine."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import timm
        except RuntimeError:
            # it looks up the schemas of two operators that its library would have defined
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
                del sys.modules[name]
            import timm
        import hgrn2.timm
    assert hgrn2.timm.MODELS
    return timm


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TINY = {"img_size": 16, "embed_dim": 16, "depth": 4, "mixers": {"hgrn2": {"expand_ratio": 8}}, "num_classes": 3}


def loader_of(timm, folder, is_training):
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(folder), split="train" if is_training else "val")
    augmentation = {"auto_augment": "rand-m5-mstd0.5", "re_prob": 0.25, "scale": (0.5, 1.0)} if is_training else {}
    return create_loader(
        dataset, input_size=(3, 16, 16), batch_size=4, is_training=is_training, num_workers=0, use_prefetcher=False,
        device=torch.device("cpu"), persistent_workers=False, **augmentation,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["hgrn2_vit_tiny", "hgrn2_cct_tiny", "hgrn1_vit_tiny", "plain_vit_tiny"])
def test_one_epoch_of_training_and_validation(timm, tmp_path, name):
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, NativeScaler, accuracy

    files.image_folder(tmp_path / "d/train", size=(20, 24))
    files.image_folder(tmp_path / "d/val", each=2, size=(20, 24))
    changes = dict(TINY)
    if name.startswith("hgrn1"):
        changes["mixers"] = {"hgrn1": {}}
    if name.startswith("plain"):
        changes["mixers"] = {"attention": {"num_heads": 2, "rope_theta": None}}
    if "vit" in name:
        changes["patch_size"] = 4
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, drop_path_rate=0.1, **changes)
    mean = ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.8)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == 6
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=1, updates_per_epoch=3, step_on_epochs=False
    )
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=3)
    criterion, scaler = SoftTargetCrossEntropy(), NativeScaler(device="cpu")
    before = {key: x.clone() for key, x in mean.module.state_dict().items()}
    model.train()
    updates = 0
    for x, y in loader_of(timm, tmp_path / "d", True):
        x, y = mixup(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(x), y)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, clip_mode="norm", parameters=model.parameters(), create_graph=False)
        updates += 1
        mean.update(model, step=updates)
        scheduler.step_update(updates, float(loss.detach()))
        assert loss.isfinite()
    assert updates == 3
    assert any(not torch.equal(x, before[key]) for key, x in mean.module.state_dict().items())
    top1, top2 = AverageMeter(), AverageMeter()
    mean.module.eval()
    with torch.no_grad():
        for x, y in loader_of(timm, tmp_path / "d", False):
            first, second = accuracy(mean.module(x), y, topk=(1, 2))
            top1.update(float(first), len(x))
            top2.update(float(second), len(x))
    assert top1.count == 6
    assert 0 <= top1.avg <= top2.avg <= 100
    saver = CheckpointSaver(model, optimizer, model_ema=mean, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=top1.avg)
    again = timm.create_model(name, checkpoint_path=str(tmp_path / "last.pth.tar"), **changes).eval()
    # timm reads the mean of the weights
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(x), mean.module(x))


def test_features_and_another_classifier(timm):
    model = timm.create_model("hgrn2_cct_tiny", features_only=True, out_indices=(1, 3), depth=4)
    found = model(torch.randn(2, 3, 32, 32))
    assert [x.shape for x in found] == [(2, 128, 8, 8)] * 2
    assert model.feature_info.channels() == [128, 128]
    assert model.feature_info.reduction() == [4, 4]
    model = timm.create_model("hgrn2_cct_tiny", num_classes=0, in_chans=1, depth=4)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_unknown_arguments_are_refused(timm):
    with pytest.raises(ValueError, match="embed_dims"):
        timm.create_model("hgrn2_vit_tiny", embed_dims=8)
    assert "hgrn2_vit_small" in timm.list_models("hgrn2*")
