//! `farshore vault …`

mod grant;
mod init;
mod key;
mod machines;
mod points;
mod revoke;
mod status;
mod unlock;
mod verify;

use clap::Subcommand;

use crate::failure::Done;
use crate::output::Output;

/// Commands about the vault.
#[derive(Debug, Subcommand)]
pub(crate) enum VaultCommand {
    /// Make a vault in an empty folder and print its recovery key, once
    Init(init::Init),
    /// What the vault is and, with a key, how current it is
    Status(status::Status),
    /// The machines that the vault protects
    Machines(machines::Machines),
    /// The moments to which a machine can be recovered, and the gaps between them
    Points(points::Points),
    /// Read everything and check it: signatures, digests, and every block of every disk
    Verify(verify::Verify),
    /// Keys: what opens the vault
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Give a new writer, such as a process server, its keys
    Grant(grant::Grant),
    /// End a writer's grant; what it committed stays
    Revoke(revoke::Revoke),
    /// Keep the read key in memory for a while, so that later commands do not ask
    Unlock(unlock::Unlock),
    /// Forget the key that `unlock` keeps
    Lock(unlock::Lock),
}

impl VaultCommand {
    pub(crate) fn run(&self, output: Output) -> Done {
        match self {
            VaultCommand::Init(command) => command.run(output),
            VaultCommand::Status(command) => command.run(output),
            VaultCommand::Machines(command) => command.run(output),
            VaultCommand::Points(command) => command.run(output),
            VaultCommand::Verify(command) => command.run(output),
            VaultCommand::Key(command) => command.run(output),
            VaultCommand::Grant(command) => command.run(output),
            VaultCommand::Revoke(command) => command.run(output),
            VaultCommand::Unlock(command) => command.run(output),
            VaultCommand::Lock(command) => command.run(output),
        }
    }
}
