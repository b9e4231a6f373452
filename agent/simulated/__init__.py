"""A simulated Ollama: real sockets, recorded manners, made-up words. For trying the router without a GPU, and for its tests."""

from agent.simulated.faults import Fault
from agent.simulated.models import Knobs, NodeSpec, SimulatedModel, demo_nodes, guessed_model, recorded_models
from agent.simulated.registry import Failure, Registry
from agent.simulated.server import SimulatedOllama

__all__ = [
    "Failure",
    "Fault",
    "Knobs",
    "NodeSpec",
    "Registry",
    "SimulatedModel",
    "SimulatedOllama",
    "demo_nodes",
    "guessed_model",
    "recorded_models",
]
