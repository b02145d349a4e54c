"""Testing a network on data sets, on BasicSR's public parts."""

from typing import Any

from basicsr.models import build_model
from basicsr.utils import get_env_info, get_time_str, make_exp_dirs, set_random_seed
from basicsr.utils.options import dict2str

from sparse_sr_attn_basicsr.loaders import evaluation_loader
from sparse_sr_attn_basicsr.logs import log_to


def test(opt: dict[str, Any]) -> None:
    """Write metrics and images to `results/<name>`.

    Args:
        opt: complete options, see `option_file.complete`.
    """
    if opt["manual_seed"] is not None:
        set_random_seed(opt["manual_seed"] + opt["rank"])
    make_exp_dirs(opt)
    with log_to(f"{opt['path']['log']}/test_{opt['name']}_{get_time_str()}.log") as logger:
        logger.info(get_env_info())
        logger.info(dict2str(opt))
        loaders = [evaluation_loader(options, opt) for _, options in sorted(opt["datasets"].items())]
        model = build_model(opt)
        for loader in loaders:
            logger.info(f"Testing {loader.dataset.opt['name']}...")
            model.validation(loader, opt["name"], tb_logger=None, save_img=opt["val"]["save_img"])
