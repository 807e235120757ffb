"""Every workflow that a worker serves."""

from __future__ import annotations

from workflows.agent import AgentWorkflow
from workflows.batch import BatchWorkflow
from workflows.delivery import DeliveryWorkflow
from workflows.orphans import OrphanSweep
from workflows.repair import RepairWorkflow

WORKFLOWS = [AgentWorkflow, BatchWorkflow, RepairWorkflow, OrphanSweep, DeliveryWorkflow]
