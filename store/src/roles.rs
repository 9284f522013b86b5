//! Who may ask for what. Roles are written in certificates, so that a node decides alone and at once.

use tidepool_proto::wire::request::Op;

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A host that runs sandboxes: keeps and reads their data.
    Host,
    /// A person or program that looks after the cluster: reads everything, changes the cluster, removes; writes no sandbox's data.
    Operator,
    /// A store node.
    Store,
    /// Whoever holds a join token: may ask to become a node, and nothing else.
    Join,
}

impl Role {
    /// As it stands in certificates.
    pub fn name(self) -> &'static str {
        match self {
            Role::Host => "host",
            Role::Operator => "operator",
            Role::Store => "store",
            Role::Join => "join",
        }
    }

    pub(crate) fn of(name: &str) -> Option<Self> {
        [Role::Host, Role::Operator, Role::Store, Role::Join]
            .into_iter()
            .find(|r| r.name() == name)
    }
}

/// Who may ask for an operation.
enum Who {
    /// Everyone with a certificate for more than joining.
    All,
    /// Who keeps sandboxes, and nodes on their behalf.
    Hosts,
    Operators,
    /// Nodes among themselves.
    Nodes,
    Joining,
}

fn who(op: &Op) -> Who {
    match op {
        Op::Status(_)
        | Op::Topology(_)
        | Op::Get(_)
        | Op::Sandbox(_)
        | Op::Sandboxes(_)
        | Op::Manifest(_)
        | Op::Manifests(_)
        | Op::TurnByKey(_)
        | Op::Turns(_)
        | Op::Image(_)
        | Op::Images(_)
        | Op::RemoveSandbox(_)
        | Op::RemoveImage(_) => Who::All,
        Op::Pin(_)
        | Op::Put(_)
        | Op::EndSession(_)
        | Op::CreateSandbox(_)
        | Op::TakeSandbox(_)
        | Op::UpdateSandboxMeta(_)
        | Op::Commit(_)
        | Op::PutImage(_) => Who::Hosts,
        Op::Policies(_) | Op::Kept(_) | Op::GcStatus(_) | Op::ScrubStatus(_) => Who::All,
        Op::IssueToken(_)
        | Op::ChangeNode(_)
        | Op::GcRun(_)
        | Op::ScrubStart(_)
        | Op::KeepCheckpoint(_)
        | Op::RemoveCheckpoints(_)
        | Op::SetPolicies(_)
        | Op::LabelSandbox(_) => Who::Operators,
        Op::Propose(_) | Op::GcRoots(_) | Op::GcLinks(_) | Op::GcOld(_) => Who::Nodes,
        Op::Join(_) => Who::Joining,
    }
}

/// Whether a role may ask for this.
pub(crate) fn allowed(role: Role, op: &Op) -> bool {
    match who(op) {
        Who::All => role != Role::Join,
        Who::Hosts => matches!(role, Role::Host | Role::Store),
        Who::Operators => matches!(role, Role::Operator | Role::Store),
        Who::Nodes => role == Role::Store,
        Who::Joining => role == Role::Join,
    }
}
