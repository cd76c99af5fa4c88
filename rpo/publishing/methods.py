"""What each method descends, in words and as a formula, and where it is from: what a model card says of it."""

METHODS = {
    "Diffusion-DPO": (
        "noises both images of a pair alike, and makes the denoising error e of the chosen one fall against that of "
        "the rejected one, by comparison with the frozen start: "
        "`L = -log σ(-β/2 [(e_w - e_w,ref) - (e_l - e_l,ref)])`",
        "https://arxiv.org/abs/2311.12908",
    ),
    "Diffusion-KTO": (
        "lowers the denoising error e of images labelled good and raises that of the others, each by a utility that is "
        "flat where an image is won or hopeless: `L = w_y (1 - σ(y β [(e_ref - e) - kl]))`, y = ±1",
        "https://arxiv.org/abs/2404.04465",
    ),
    "MaPO": (
        "fits the chosen image and widens its odds f against the rejected one, without a reference: "
        "`L = e_w - β log σ(T [f(e_w) - f(e_l)])`",
        "https://arxiv.org/abs/2406.06424",
    ),
    "GRPO": (
        "draws images of a prompt, compares their rewards with the mean of their group, and makes every sampling step "
        "of the better ones likelier: `A = (r - mean) / std`, `L = -Σ_k min(A ρ_k, A clip(ρ_k))`",
        "https://arxiv.org/abs/2505.05470",
    ),
    "DDPO": (
        "draws images of a prompt, compares their rewards with the prompt's recent ones, and makes every sampling step "
        "of the better ones likelier: `A = (r - mean) / std`, `L = -Σ_k min(A ρ_k, A clip(ρ_k))`",
        "https://arxiv.org/abs/2305.13301",
    ),
    "ScoreAsAction": (
        "takes the score as the action of a control problem in continuous time, and climbs reward less the path's "
        "distance from the frozen start: `J = E[r(x_0)] - kl_weight ∫ ½|u|² dt`",
        "https://arxiv.org/abs/2502.01819",
    ),
    "Endpoint": (
        "noises drawn images afresh, and fits the better ones more than the worse ones, by the bound on the likelihood "
        "of a whole image: `L = E_{t,ε} A · KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t))`",
        "https://arxiv.org/abs/2006.11239",
    ),
    **{
        name: (
            "noises drawn images afresh, and fits what the network says there by what they are worth: "
            f"`gradient = E Jᵀ[a (v̄ - v*) + Σ b (v - v_anchor)]` with {name}'s a and b",
            f"https://arxiv.org/abs/{paper}",
        )
        for name, paper in {
            "DiffusionNFT": "2509.16117",
            "AWM": "2509.25050",
            "RAM": "2605.10759",
            "RVM": "2608.23664",
            "PAR": "2602.04663",
            "DGPO": "2510.08425",
            "REBEL": "2404.16767",
        }.items()
    },
    **{
        name: (f"{how}: `L = -Σ_k ⟨v_k, ∂r/∂v_k⟩`", f"https://arxiv.org/abs/{paper}")
        for name, (how, paper) in {
            "DRaFT": ("differentiates the reward through the sampler's last steps", "2309.17400"),
            "AlignProp": (
                "differentiates the reward through the sampler, later steps more than early ones",
                "2310.03739",
            ),
            "ReFL": ("differentiates the reward of the image that a late step predicts", "2304.05977"),
            "SRPO": (
                "differentiates the reward of noised images after one step, by a good and a bad wording",
                "2509.06942",
            ),
        }.items()
    },
    "Adjoint Matching": (
        "fits the policy's control u to the reward's slope a, which is followed back through the frozen start: "
        "`L = Σ_k ½ ‖u_k - std a_k / kl_weight‖²`",
        "https://arxiv.org/abs/2409.08861",
    ),
    "Rich Preference Optimization": (
        "lets a critic say what is wrong with the model's own images, an editor mend it and judges compare, and then "
        "trains on the pairs by Diffusion-DPO: `L = -log σ(-β/2 [(e_w - e_w,ref) - (e_l - e_l,ref)])`",
        "https://arxiv.org/abs/2503.11720",
    ),
}
"""By what a person calls it."""
