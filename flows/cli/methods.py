"""Methods as `--help` lists them. Written out here, since importing the methods takes torch and with it seconds; a test
compares the names, and what each needs, with the registries."""

from collections.abc import Mapping

TRAINING = {
    "standard": "plain training.",
    "prl_l": "drops the largest loss gradients with respect to the output. Needs --tau. B. Liu 2022, Algorithm 4.",
    "prl_g": "the same with respect to all weights; slower. Needs --tau. B. Liu 2022, Algorithm 3.",
    "spl": "drops the largest losses (self-paced learning). Needs --tau. Kumar et al. 2010.",
    "min_sgd": "learns from the smallest loss of each batch alone; ignores --tau. Shah et al. 2020.",
    "co_teaching": "two networks; each learns from what spl keeps of the other. Needs --tau. Han et al. 2018.",
    "co_prl_l": "the same with prl_l. Needs --tau. B. Liu 2022, Algorithm 5.",
    "decouple": "two networks; learns where their predictions differ; ignores --tau. Malach & Shalev-Shwartz 2017.",
    "bootstrap": "mixes the predicted class into the label; ignores --tau. Reed et al. 2014.",
    "at": "one adversarial step on each sample; against triggers; ignores --tau. B. Liu 2022, Eq. 5.5.",
    "spl_at": "spl, then at on the kept samples. Needs --tau. B. Liu 2022, Table 5.1.",
    "prl_at": "prl_l, then at on the kept samples. Needs --tau. B. Liu 2022, Algorithm 6.",
    "bootstrap_at": "bootstrap and at; ignores --tau. B. Liu 2022, Table 5.1.",
    "pgd_at": "adversarial training on the worst input of a ball; ignores --tau. Madry et al. 2018.",
    "trades": "the same, with equal predictions in the ball as the goal; ignores --tau. Zhang et al. 2019.",
}

REPAIRS = {
    "drr": "projects the direction of a second cluster out of the weights. Needs --shards. Directional Rank Reduction.",
    "ibau": "unlearns the perturbation that hurts most. Needs --clean-shards. Zeng et al. 2022.",
    "fine_tuning": "a few more epochs on clean images. Needs --clean-shards.",
    "fine_pruning": "prunes channels that clean images leave dormant, then fine-tunes. Needs --clean-shards. Liu, "
    "Dolan-Gavitt & Garg 2018.",
    "clp": "prunes channels with an unusually large Lipschitz constant. Needs no data. Zheng et al. 2022.",
    "ep": "prunes channels with an unusually low entropy. Needs --shards. Zheng et al. 2022.",
    "anp": "prunes channels that small perturbations of the weights turn bad. Needs --clean-shards. Wu & Wang 2021.",
    "nad": "distils attention maps from a fine-tuned copy. Needs --clean-shards. Li et al. 2021.",
    "neural_cleanse": "reconstructs triggers, unlearns unusually small ones. Needs --clean-shards. Wang et al. 2019.",
}

ATTACKS = {
    "adaptive_blend": "random pieces of a blended pattern, and cover samples with their true label. Qi et al. 2023.",
    "badnets": "a small patch in a corner, and the target label. Gu, Dolan-Gavitt & Garg 2017.",
    "blended": "noise blended into the whole image, and the target label. Chen et al. 2017.",
    "clean_label": "perturbed images of the target class with a patch in each corner; labels stay; also called "
    "label_consistent. Needs --surrogate. Turner, Tsipras & Madry 2019.",
    "l0": "a few pixels become black or white, and the target label. After Li et al. 2020.",
    "l2": "a short change of the image, and the target label. After Li et al. 2020.",
    "labels": "label noise: images stay, labels are flipped.",
    "sig": "a sinusoid on images of the target class; labels stay. Barni, Kallas & Tondi 2019.",
    "smooth": "a smooth pattern of low frequencies, and the target label. After Zeng et al. 2021.",
    "tact": "a patch that works on source classes alone, with cover samples of others. Tang et al. 2021.",
    "trojan_square": "a square of random colours, and the target label. Liu et al. 2018.",
    "trojan_watermark": "a translucent ring with a bar, and the target label. Liu et al. 2018.",
    "wanet": "an elastic warp of the image, and the target label. Nguyen & Tran 2021.",
    "several": "several attacks, each on samples of its own. Needs --set attacks=[...].",
}


def _listed(title: str, methods: Mapping[str, str]) -> str:
    """Markdown, one line a method."""
    return f"{title}:\n\n" + "\n".join(f"* `{name}`: {text}" for name, text in methods.items())


# Below the options of a command.
EPILOGS = {
    "train": _listed("Methods", TRAINING),
    "repair": _listed("Repairs", REPAIRS),
    "poison": _listed("Attacks", ATTACKS),
}
