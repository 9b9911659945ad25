"""README.md's losses to copy: its text, pasted into an update in CleanRL's style, computes what the scripts compute."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, check_loss, make_agent, make_batch
from same_code import SCRIPTS
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("float64")
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
TARGET = """
noise = (args.policy_noise * torch.randn_like(data.actions)).clamp(-args.noise_clip, args.noise_clip)
next_state_actions = (target_actor(data.next_observations) + noise).clamp(-1, 1)
qf1_next_target = qf1_target(data.next_observations, next_state_actions)
qf2_next_target = qf2_target(data.next_observations, next_state_actions)
min_qf_next_target = torch.min(qf1_next_target, qf2_next_target)
next_q_value = data.rewards.flatten() + (1 - data.dones.flatten()) * args.gamma * min_qf_next_target.flatten()
"""
LOSS = """
qf1_loss = F.mse_loss(qf1(data.observations, data.actions).flatten(), next_q_value)
qf2_loss = F.mse_loss(qf2(data.observations, data.actions).flatten(), next_q_value)
qf_loss = qf1_loss + qf2_loss
"""


def readme(text: str) -> str:
    """The one block of code that has text."""
    (code,) = [code for code in CODE if text in code]
    return code


def without_seeds(network, twin: int):
    """The first seed's critic (observations [B, O], actions [B, A]) -> [B, 1]."""
    return lambda *inputs: network(*[column.unsqueeze(0) for column in inputs])[0, twin].unsqueeze(1)


def get_action(agent, observations):
    """Of CleanRL's SAC: actions [B, A], their log-probability [B, 1] and the squashed mean [B, A]."""
    actions, log_prob, mean_actions = agent.actor.sample(observations.unsqueeze(0))
    return actions.squeeze(0), log_prob.squeeze(0).unsqueeze(1), mean_actions.squeeze(0)


def check_update(path: str, snippet: str, target: str, penalty: str) -> None:
    """The update's qf_loss and its gradient are agent.critic_loss's, from the same networks, batch and draws."""
    agent = make_agent(path, num_seeds=1)
    batch = make_batch(path)
    columns = {name: column[0] for name, column in batch._asdict().items()}
    data = SimpleNamespace(**columns, dones=batch.terminations[0])
    names = {"torch": torch, "F": F, "args": agent.args, "data": data}
    if path.startswith("td3"):
        names["target_actor"] = lambda observations: agent.target_actor(observations.unsqueeze(0)).squeeze(0)
    else:
        names |= {"alpha": agent.alpha().item(), "actor": SimpleNamespace(get_action=partial(get_action, agent))}
    names |= {"qf1": without_seeds(agent.critic, 0), "qf1_target": without_seeds(agent.target_critic, 0)}
    names |= {"qf2": without_seeds(agent.critic, 1), "qf2_target": without_seeds(agent.target_critic, 1)}
    torch.manual_seed(1)
    exec(snippet, names)
    with torch.no_grad():
        exec(target, names)
    exec(LOSS + penalty, names)
    torch.manual_seed(1)
    loss, _ = agent.critic_loss(type(batch)(*[column[:1] for column in batch]))
    check_loss(names["qf_loss"].unsqueeze(0), loss, agent.critic)


@pytest.mark.parametrize("path, actor", [("td3_ams.py", "target_actor("), ("sac_ams.py", "actor.get_action(")])
def test_ams(path, actor):
    check_update(path, readme("def ams_next_values"), readme(actor), "")


def test_ams_in_units_of_the_actions():
    """A critic of actions from -1 to 3 and one of the same actions from -1 to 1 have the same values."""
    names = {}
    exec(readme("def ams_next_values"), names)
    observations = torch.randn(6, 3)
    actions = 2 * torch.rand(6, 2) - 1
    values = []
    for low, high in ((-1.0, 1.0), (torch.tensor([-1.0, -1.0]), torch.tensor([3.0, 3.0]))):
        scale = (high - low) / 2

        def critic(observations, actions, low=low, scale=scale):
            return observations.sum(1, keepdim=True) + ((actions - low) / scale).pow(3).sum(1, keepdim=True)

        torch.manual_seed(1)
        values.append(names["ams_next_values"](critic, critic, observations, low + scale * (actions + 1), low, high))
    torch.testing.assert_close(*values)


def test_pave():
    check_update("td3_pave.py", readme("def pave_terms"), TARGET, readme("qf_loss = qf_loss"))


def test_no_snippet_has_the_name_of_a_function_of_the_scripts():
    pasted = {name for code in CODE for name in re.findall(r"^def (\w+)", code, re.MULTILINE)}
    scripts = "\n".join(path.read_text() for path in SCRIPTS)
    ours = set(re.findall(r"^def (\w+)", scripts, re.MULTILINE))
    assert {"ams_next_values", "pave_terms"} <= pasted and not pasted & ours
