//! SSH: the VM's own host key, and what the agent's server is told. It needs no network: the agent's channel is enough.

use async_trait::async_trait;
use offshoot_agent_proto::v1;
use offshoot_model::SshConfig;

use super::blocking;
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::{VmDefinition, VmRecord};
use crate::paths::VmPaths;
use crate::run::Run;
use crate::ssh_keys::{HostKey, HostKeyError};

/// The port of SSH (RFC 4253, section 4.1).
const PORT: u16 = 22;

/// Makes a VM's host key at its first start and keeps it as long as the VM.
pub struct SshCapability;

#[async_trait]
impl Capability for SshCapability {
    fn name(&self) -> &'static str {
        "ssh"
    }

    fn plan(&self, vm: &VmRecord, _: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        let VmDefinition {
            config,
            process,
            attachment,
            ..
        } = &vm.definition;
        plan.guest.ssh = Some(v1::SshServer {
            // As `exec` has it: what the main process has, or with the image's init what was asked for.
            env: process
                .as_ref()
                .map_or(&config.env, |process| &process.env)
                .iter()
                .map(ToString::to_string)
                .collect(),
            ..server(&config.ssh, config.init, attachment.is_some())
        });
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        let path = run.paths.ssh_host_key();
        let key = blocking(move || {
            let key = HostKey::ensure(&path)?;
            key.to_openssh()
                .map_err(|source| HostKeyError::Broken { path, source })
        });
        run.set_host_key(key.await.map_err(|error| Box::new(error) as CapabilityError)?);
        Ok(())
    }
}

/// The port that a client finds on a VM's address; nothing where the server listens on none by itself.
pub fn port(config: &SshConfig) -> Option<u16> {
    match config.port {
        None => Some(PORT),
        Some(0) => None,
        Some(port) => Some(port),
    }
}

/// What the agent is told. The host key is no part of the plan: plans are shown and compared, secrets are not.
fn server(config: &SshConfig, init: bool, listens: bool) -> v1::SshServer {
    v1::SshServer {
        host_key: String::new(),
        authorized_keys: config.keys.clone(),
        port: port(config).filter(|_| listens).unwrap_or(0).into(),
        yield_to_sshd: init && config.port.is_none(),
        env: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_s_sshd_goes_first_unless_a_port_was_asked_for() {
        for (asked, init, listens, port, yields) in [
            (None, false, true, 22, false),
            (None, true, true, 22, true),
            (Some(2222), true, true, 2222, false),
            (Some(22), true, true, 22, false),
            (Some(0), false, true, 0, false),
            // Without a network there is nothing to listen on.
            (None, false, false, 0, false),
            (Some(22), false, false, 0, false),
        ] {
            let config = SshConfig {
                keys: vec!["a key".into()],
                port: asked,
            };
            let told = server(&config, init, listens);
            assert_eq!(
                (told.port, told.yield_to_sshd),
                (port, yields),
                "{asked:?} {init} {listens}"
            );
            assert_eq!(told.authorized_keys, ["a key"]);
        }
    }
}
