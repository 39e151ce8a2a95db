"""The one table of all methods: ninety-five papers, and the baselines everyone compares with.

Listing it imports neither torch nor the methods. A row works when its module is there: `methods/<family>/
<slug>.py`, with `-` written `_`; it is planned until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from etude.experience.errors import UserError, unknown


@dataclass(frozen=True)
class Entry:
    """One method. `number` is None for a baseline; `arxiv` is empty where no paper is the source."""

    number: int | None
    slug: str
    name: str
    title: str
    arxiv: str
    year: int | None
    family: str

    @property
    def module(self) -> str:
        """The module that holds the method, once it is written."""
        return f"etude.methods.{self.family}.{self.slug.replace('-', '_')}"

    @property
    def works(self) -> bool:
        """Whether the module is there."""
        return (Path(__file__).parent / self.family / f"{self.slug.replace('-', '_')}.py").is_file()


FAMILIES = {
    "reward": "learn from verifiable rewards",
    "demonstrations": "learn from demonstrations",
    "preferences": "learn from comparisons",
    "agents": "act over many turns",
    "critics": "judge and criticise",
    "scheduling": "choose what comes next, and how fast",
    "continual": "learn without forgetting",
    "inference": "act better without training",
    "safety": "unlearn, refuse, audit refusal",
    "control": "act in grids, games and bodies",
    "analysis": "explain what was learnt",
}

# fmt: off
_ROWS: tuple[tuple[int | None, str, str, str, str, int | None, str], ...] = (
    (None, "sft", "SFT", "Supervised fine-tuning on demonstrations", "", None, "demonstrations"),
    (None, "rft", "RFT", "Scaling Relationship on Learning Mathematical Reasoning with Large Language Models", "2308.01825", 2023, "demonstrations"),
    (None, "grpo", "GRPO", "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", "2402.03300", 2024, "reward"),
    (None, "dr-grpo", "Dr. GRPO", "Understanding R1-Zero-Like Training: A Critical Perspective", "2503.20783", 2025, "reward"),
    (None, "dapo", "DAPO", "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", "2503.14476", 2025, "reward"),
    (None, "rloo", "RLOO", "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs", "2402.14740", 2024, "reward"),
    (None, "group-rl", "Group RL", "Any curriculum, acting, credit and objective that fit together", "", None, "reward"),
    (None, "dpo", "DPO", "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "2305.18290", 2023, "preferences"),
    (1, "calm", "CALM (Credit Assignment with Language Models)", "Assessing the Zero-Shot Capabilities of LLMs for Action Evaluation in RL", "2409.12798", 2024, "critics"),
    (2, "sec", "SEC (Self-Evolving Curriculum)", "Self-Evolving Curriculum for LLM Reasoning", "2505.14970", 2025, "scheduling"),
    (3, "chain-of-hindsight", "CoH (Chain of Hindsight)", "Chain of Hindsight Aligns Language Models with Feedback", "2302.02676", 2023, "demonstrations"),
    (4, "spa-rl", "SPA-RL (Stepwise Progress Attribution)", "SPA-RL: Reinforcing LLM Agents via Stepwise Progress Attribution", "2505.20732", 2025, "agents"),
    (5, "archer", "ArCHer (Actor-Critic with a Hierarchical Structure)", "ArCHer: Training Language Model Agents via Hierarchical Multi-Turn RL", "2402.19446", 2024, "agents"),
    (6, "l2m", "L2M (Learning-to-Modulate)", "Learning to Modulate pre-trained Models in RL", "2306.14884", 2023, "continual"),
    (7, "otr", "OTR (One-Token Rollout)", "One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient", "2509.26313", 2025, "demonstrations"),
    (8, "leap", "LeaP (Learning from Peers)", "Learning from Peers in Reasoning Models", "2505.07787", 2025, "inference"),
    (9, "lm-cascade-quantile", "Token-level uncertainty cascade (Chow-Quantile, Post-Hoc-Quantile, Post-Hoc-Embed)", "Language Model Cascades: Token-level uncertainty and beyond", "2404.10136", 2024, "inference"),
    (10, "rocr-ort", "ROCR (rank-one concept redirection) and the ORT benchmark", "LLM Unlearning Should Be Form-Independent", "2506.07795", 2025, "safety"),
    (11, "tinyhelen", "TinyHelen / Leaner data and iterative curriculum", "TinyHelen's First Curriculum: Training and Evaluating Tiny Language Models in a Simpler Language Environment", "2501.00522", 2025, "scheduling"),
    (12, "sharpening", "Sharpening (SFT-Sharpening / RLHF-Sharpening)", "Self-Improvement in Language Models: The Sharpening Mechanism", "2412.01951", 2024, "reward"),
    (13, "rise", "RISE (Recursive IntroSpEction)", "Recursive Introspection: Teaching Language Model Agents How to Self-Improve", "2407.18219", 2024, "demonstrations"),
    (14, "sami", "SAMI (Self-Supervised Alignment with Mutual Information)", "Self-Supervised Alignment with Mutual Information: Learning to Follow Principles without Preference Labels", "2404.14313", 2024, "preferences"),
    (15, "step", "STeP (Self-Reflected Trajectories and Partial Masking)", "Training LLM-Based Agents with Synthetic Self-Reflected Trajectories and Partial Masking", "2505.20023", 2025, "demonstrations"),
    (16, "qweb", "QWeb / MetaQWeb (curriculum DQN for web navigation)", "Learning to Navigate the Web", "1812.09195", 2018, "agents"),
    (17, "itool", "iTool (iterative reinforced fine-tuning for tool use)", "Boosting Tool Use of Large Language Models via Iterative Reinforced Fine-Tuning", "2501.09766", 2025, "preferences"),
    (18, "past-tense-audit", "Past-tense refusal audit and past-tense refusal training", "Does Refusal Training in LLMs Generalize to the Past Tense?", "2407.11969", 2024, "safety"),
    (19, "ads", "ADS (Automatic Discount Scheduling)", "Imitation Learning from Observation with Automatic Discount Scheduling", "2310.07433", 2023, "control"),
    (20, "implicit-reward-sft", "Implicit-reward view of SFT (small-lr SFT and f-divergence SFT before DPO)", "Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections", "2507.00018", 2025, "demonstrations"),
    (21, "targeted-lat", "Targeted latent adversarial training (LAT)", "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs", "2407.15549", 2024, "safety"),
    (22, "refuel", "REFUEL (REgressing the RELative FUture)", "Regressing the Relative Future: Efficient Policy Optimization for Multi-turn RLHF", "2410.04612", 2024, "preferences"),
    (23, "doc", "Dichotomy of Control (DoC)", "Dichotomy of Control: Separating What You Can Control from What You Cannot", "2210.13435", 2022, "control"),
    (24, "skill-it", "Skill-It", "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models", "2307.14430", 2023, "scheduling"),
    (25, "askdagger", "ASkDAgger (SAG + FIER + PIER)", "ASkDAgger: Active Skill-level Data Aggregation for Interactive Imitation Learning", "2508.05310", 2025, "demonstrations"),
    (26, "agentrefine", "AgentRefine (refinement tuning)", "AgentRefine: Enhancing Agent Generalization through Refinement Tuning", "2501.01702", 2025, "demonstrations"),
    (27, "lr-refinement", "Linear decay and schedule refinement", "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement", "2310.07831", 2023, "scheduling"),
    (28, "score", "SCoRe (Self-Correction via Reinforcement Learning)", "Training Language Models to Self-Correct via Reinforcement Learning", "2409.12917", 2024, "reward"),
    (29, "tt-si", "TT-SI / TT-D (test-time self-improvement / test-time distillation)", "Self-Improving LLM Agents at Test-Time", "2510.07841", 2025, "inference"),
    (30, "smart", "SMART (self-learning meta-strategy agent)", "SMART: Self-learning Meta-strategy Agent for Reasoning Tasks", "2410.16128", 2024, "demonstrations"),
    (31, "aime-v2", "AIME-v2 (later renamed AIME-NoB)", "Overcoming Knowledge Barriers: Online Imitation Learning from Observation with Pretrained World Models", "2404.18896", 2024, "control"),
    (32, "dler", "DLER (Doing Length pEnalty Right)", "DLER: Doing Length pEnalty Right - Incentivizing More Intelligence per Token via Reinforcement Learning", "2510.15110", 2025, "reward"),
    (33, "mistake-tuning", "CoTErrorSet - self-rethinking and mistake tuning", "Can LLMs Learn from Previous Mistakes? Investigating LLMs' Errors to Boost for Reasoning", "2403.20046", 2024, "demonstrations"),
    (34, "vedit", "VEDIT (Vector Embedding Diffusion Transformer)", "VEDIT: Latent Prediction Architecture For Procedural Video Representation Learning", "2410.03478", 2024, "control"),
    (35, "regret-loss", "Regret-loss training of no-regret agents (and regret audits of LLM agents)", "Do LLM Agents Have Regret? A Case Study in Online Learning and Games", "2403.16843", 2024, "control"),
    (36, "four-habits", "Cognitive behaviours / Four Habits (behaviour priming before RL)", "Cognitive Behaviors that Enable Self-Improving Reasoners, or, Four Habits of Highly Effective STaRs", "2503.01307", 2025, "demonstrations"),
    (37, "envgen", "EnvGen", "EnvGen: Generating and Adapting Environments via LLMs for Training Embodied Agents", "2403.12014", 2024, "agents"),
    (38, "a-lol", "A-LoL (Advantage-Leftover Lunch RL)", "Improving Language Models with Advantage-based Offline Policy Gradients", "2305.14718", 2023, "preferences"),
    (39, "tailored-learning", "Tailored learning from an LLM (Learn-to-Reason; multi-round teacher feedback + self-reflection contrast)", "Democratizing Reasoning Ability: Tailored Learning from Large Language Model", "2310.13332", 2023, "demonstrations"),
    (40, "agent-r", "Agent-R", "Agent-R: Training Language Model Agents to Reflect via Iterative Self-Training", "2501.11425", 2025, "agents"),
    (41, "first-try", "First Try Matters (reflection analysis, cut-at-i SFT, question-aware early stopping)", "First Try Matters: Revisiting the Role of Reflection in Reasoning Models", "2510.08308", 2025, "demonstrations"),
    (42, "rise-edit", "RISE (eRror-Injected Self-Editing)", "Subtle Errors Matter: Preference Learning via Error-injected Self-editing", "2410.06638", 2024, "preferences"),
    (43, "retuning", "RETuning (Reflective Evidence Tuning)", "RETuning: Upgrading Inference-Time Scaling for Stock Movement Prediction with Large Language Models", "2510.21604", 2025, "reward"),
    (44, "spar", "SPaR (Self-Play with tree-search Refinement)", "SPaR: Self-Play with Tree-Search Refinement to Improve Instruction-Following in Large Language Models", "2412.11605", 2024, "preferences"),
    (45, "l2rlcf", "L2RLCF (Lifelong Reinforcement Learning Components Framework)", "System Design for an Integrated Lifelong Reinforcement Learning Agent for Real-Time Strategy Games", "2212.04603", 2022, "continual"),
    (46, "curricula-in-fl", "Ordered learning and curriculum client selection in federated learning", "When Do Curricula Work in Federated Learning?", "2212.12712", 2022, "scheduling"),
    (47, "rlpt", "RLPT (Reinforcement Learning on Pre-Training data)", "Reinforcement Learning on Pre-Training Data", "2509.19249", 2025, "reward"),
    (48, "simple-cpt", "Simple and scalable continual pre-training (re-warm, re-decay, replay; infinite schedules)", "Simple and Scalable Strategies to Continually Pre-train Large Language Models", "2403.08763", 2024, "continual"),
    (49, "retroformer", "Retroformer", "Retroformer: Retrospective Large Language Agents with Policy Gradient Optimization", "2308.02151", 2023, "agents"),
    (50, "stability-gap", "Continual pre-training against the stability gap (subset x epochs, high-quality subset, pre-training mixture)", "Efficient Continual Pre-training by Mitigating the Stability Gap", "2406.14833", 2024, "scheduling"),
    (51, "autolrs", "AutoLRS", "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly", "2105.10762", 2021, "scheduling"),
    (52, "dco", "DCO (Direct Coverage Optimization)", "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning", "2502.07154", 2025, "reward"),
    (53, "dph-rl", "DPH-RL (Diversity-Preserving Hybrid RL)", "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in Reinforcement Learning with Verifiable Reward", "2509.07430", 2025, "reward"),
    (54, "dno", "DNO (Direct Nash Optimization), with DNO-Prct", "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences", "2404.03715", 2024, "preferences"),
    (55, "bridge", "Bridge (expert decision-making model for remediation)", "Bridging the Novice-Expert Gap via Models of Decision-Making: A Case Study on Remediating Math Mistakes", "2310.10648", 2024, "demonstrations"),
    (56, "lspo", "LSPO (Latent Space Policy Optimization)", "Learning Strategic Language Agents in the Werewolf Game with Iterative Latent Space Policy Optimization", "2502.04686", 2025, "agents"),
    (57, "libero", "LIBERO lifelong imitation benchmark (SEQL, ER, EWC, PackNet; FWT, NBT, AUC)", "LIBERO: Benchmarking Knowledge Transfer for Lifelong Robot Learning", "2306.03310", 2023, "continual"),
    (58, "nft", "NFT (Negative-aware Fine-Tuning)", "Bridging Supervised Learning and Reinforcement Learning in Math Reasoning", "2505.18116", 2025, "reward"),
    (59, "rain", "RAIN (Rewindable Auto-regressive INference)", "RAIN: Your Language Models Can Align Themselves without Finetuning", "2309.07124", 2023, "inference"),
    (60, "td-jepa", "TD-JEPA", "TD-JEPA: Latent-predictive Representations for Zero-Shot Reinforcement Learning", "2510.00739", 2025, "control"),
    (61, "aba", "ABA (Asking Before Action)", "Asking Before Action: Gather Information in Embodied Decision Making with Language Models", "2305.15695", 2023, "demonstrations"),
    (62, "lora-refusal-audit", "LoRA fine-tuning audit of refusal training", "LoRA Fine-tuning Efficiently Undoes Safety Training in Llama 2-Chat 70B", "2310.20624", 2023, "safety"),
    (63, "rlhs", "RLHS (Reinforcement Learning from Hindsight Simulation)", "RLHS: Mitigating Misalignment in RLHF with Hindsight Simulation", "2501.08617", 2025, "preferences"),
    (64, "derta", "DeRTa (Decoupled Refusal Training)", "Refuse Whenever You Feel Unsafe: Improving Safety in LLMs via Decoupled Refusal Training", "2407.09121", 2024, "demonstrations"),
    (65, "offline-il-minigrid", "IL pre-training and concurrent IL for PPO (offline data in procedurally generated environments)", "Using Offline Data to Speed-up Reinforcement Learning in Procedurally Generated Environments", "2304.09825", 2023, "control"),
    (66, "relift", "ReLIFT (Reinforcement Learning Interleaved with Online Fine-Tuning)", "Learning What Reinforcement Learning Can't: Interleaved Online Fine-Tuning for Hardest Questions", "2506.07527", 2025, "reward"),
    (67, "rmt", "RMT (Reinforcement Mid-Training)", "Reinforcement Mid-Training", "2509.24375", 2025, "reward"),
    (68, "dualformer", "Dualformer (randomised, structured trace dropping)", "Dualformer: Controllable Fast and Slow Thinking by Learning with Randomized Reasoning Traces", "2410.09918", 2024, "demonstrations"),
    (69, "guard", "GUARD (generation-time unlearning via adaptive restriction and detection)", "GUARD: Generation-time LLM Unlearning via Adaptive Restriction and Detection", "2505.13312", 2025, "safety"),
    (70, "read", "ReAd (Reinforced Advantage feedback; ReAd-S, ReAd-J)", "Towards Efficient LLM Grounding for Embodied Multi-Agent Collaboration", "2405.14314", 2024, "agents"),
    (71, "parallel-r1", "Parallel-R1", "Parallel-R1: Towards Parallel Thinking via Reinforcement Learning", "2509.07980", 2025, "reward"),
    (72, "scaf-grpo", "Scaf-GRPO (Scaffolded Group Relative Policy Optimization)", "Scaf-GRPO: Scaffolded Group Relative Policy Optimization for Enhancing LLM Reasoning", "2510.19807", 2025, "reward"),
    (73, "ek-fac-influence", "EK-FAC influence functions", "Studying Large Language Model Generalization with Influence Functions", "2308.03296", 2023, "analysis"),
    (74, "critique-rl", "Critique-RL", "Critique-RL: Training Language Models for Critiquing through Two-Stage Reinforcement Learning", "2510.24320", 2025, "critics"),
    (75, "br-rm", "BR-RM (Branch-and-Rethink reasoning reward model)", "Think Twice: Branch-and-Rethink Reasoning Reward Model", "2510.23596", 2025, "critics"),
    (76, "qwen25-math", "Qwen2.5-Math self-improvement pipeline", "Qwen2.5-Math Technical Report: Toward Mathematical Expert Model via Self-Improvement", "2409.12122", 2024, "demonstrations"),
    (77, "ma-rlhf", "MA-RLHF / MA-PPO (RLHF with Macro Actions)", "MA-RLHF: Reinforcement Learning from Human Feedback with Macro Actions", "2410.02743", 2024, "reward"),
    (78, "sbd", "Skill Boundary Detection (SBD)", "Open-World Skill Discovery from Unsegmented Demonstrations", "2503.10684", 2025, "control"),
    (79, "rehearsal-free-cl", "Rehearsal-free continual learning with L2 / PredKD", "A Closer Look at Rehearsal-Free Continual Learning", "2203.17269", 2022, "continual"),
    (80, "agent-q", "Agent Q", "Agent Q: Advanced Reasoning and Learning for Autonomous AI Agents", "2408.07199", 2024, "agents"),
    (81, "delta-learning", "Delta learning (weak-over-weaker preference tuning)", "The Delta Learning Hypothesis: Preference Tuning on Weak Data can Yield Strong Gains", "2507.06187", 2025, "preferences"),
    (82, "dump", "DUMP (distribution-level curriculum by UCB)", "DUMP: Automated Distribution-Level Curriculum Learning for RL-based LLM Post-training", "2504.09710", 2025, "reward"),
    (83, "igpo", "IGPO (Information Gain-based Policy Optimization)", "Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn LLM Agents", "2510.14967", 2025, "reward"),
    (84, "dcolt", "DCoLT (Diffusion Chain of Lateral Thought); LLaDOU = DCoLT on LLaDA with an Unmasking Policy Module", "Reinforcing the Diffusion Chain of Lateral Thought with Diffusion Language Models", "2505.10446", 2025, "reward"),
    (85, "skill-unlearning-na-ksd", "Neuron Adjust (NA) and Key Space Detection (KSD)", "Effective Skill Unlearning through Intervention and Abstention", "2503.21730", 2025, "safety"),
    (86, "deepcritic", "DeepCritic", "DeepCritic: Deliberate Critique with Large Language Models", "2505.00662", 2025, "reward"),
    (87, "ghpo", "GHPO (Guided Hybrid Policy Optimization)", "GHPO: Adaptive Guidance for Stable and Efficient LLM Reinforcement Learning", "2507.10628", 2025, "reward"),
    (88, "backtracking", "How much backtracking (controlled backtrack counts in SFT before RL)", "How Much Backtracking is Enough? Exploring the Interplay of SFT and RL in Enhancing LLM Reasoning", "2505.24273", 2025, "reward"),
    (89, "critique-in-the-loop", "AutoMathCritique / critique-in-the-loop self-improvement", "Enhancing LLM Reasoning via Critique Models with Test-Time and Training-Time Supervision", "2411.16579", 2024, "critics"),
    (90, "protected", "PROTECTED (pre-training non-dominated policies towards online adaptation)", "Beyond Worst-case Attacks: Robust RL with Adaptive Defense via Non-dominated Policies", "2402.12673", 2024, "control"),
    (91, "vpt", "Video PreTraining (VPT)", "Video PreTraining (VPT): Learning to Act by Watching Unlabeled Online Videos", "2206.11795", 2022, "control"),
    (92, "blind-act", "Blind goal-directedness audit (BLIND-ACT)", "Just Do It!? Computer-Use Agents Exhibit Blind Goal-Directedness", "2510.01670", 2025, "agents"),
    (93, "speculative-thinking", "Speculative Thinking", "Speculative Thinking: Enhancing Small-Model Reasoning with Large Model Guidance at Inference Time", "2504.12329", 2025, "inference"),
    (94, "hex", "HEX (Hidden semi-autoregressive EXperts)", "Test-Time Scaling in Diffusion LLMs via Hidden Semi-Autoregressive Experts", "2510.05040", 2025, "inference"),
    (95, "mlm-u", "MLM-U (masked LM with uniform masking rate, for planning)", "Transformers Can Navigate Mazes With Multi-Step Prediction", "2412.05117", 2024, "demonstrations"),
)
# fmt: on

CATALOG: dict[str, Entry] = {row[1]: Entry(*row) for row in _ROWS}


def entry(slug: str) -> Entry:
    """The row of a method. Raises UserError with the nearest slugs if there is none."""
    try:
        return CATALOG[slug]
    except KeyError:
        raise unknown("method", slug, CATALOG) from None


def load_parts() -> None:
    """Imports every method that is written, so that the parts it registers can be named."""
    for row in CATALOG.values():
        if row.works:
            import_module(row.module)


def load(slug: str) -> ModuleType:
    """The module of a method. Raises UserError if it is not written yet."""
    row = entry(slug)
    if not row.works:
        raise UserError(f"method {slug!r} is planned, not written yet: `etude list` shows what works")
    return import_module(row.module)
