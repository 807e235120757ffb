"""Every workflow that a worker serves."""

from __future__ import annotations

from workflows.agent import AgentWorkflow
from workflows.batch import BatchWorkflow
from workflows.orphan_sweep import OrphanSweep
from workflows.recovery import RepairWorkflow
from workflows.webhook_delivery import DeliveryWorkflow

WORKFLOWS = [AgentWorkflow, BatchWorkflow, RepairWorkflow, OrphanSweep, DeliveryWorkflow]
