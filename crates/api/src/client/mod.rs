//! A client for the daemon: one typed method for every endpoint.
//!
//! Not for terminals, files or archives: whoever calls it brings bytes and takes bytes. Dropping a future or an
//! answer closes its connection, and the daemon gives up what it did for it.

mod connection;
mod error;
mod lines;
mod logs;
mod reach;
mod session;
mod ssh;
mod url;
mod websocket;
mod work;

use std::path::{Path, PathBuf};

use http::Method;
use offshoot_model::{OperationTiming, VmConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use connection::{AnswerBody, Upload};
pub use error::{ClientError, ProtocolError};
pub use lines::{Events, Lines};
pub use logs::Logs;
pub use session::{ClientMessage, DaemonMessage, Session, SessionSink, SessionStream};
pub use ssh::{SshSink, SshStream, SshTunnel};
pub use work::Work;

use crate::channel::ExecStart;
use crate::dns::DnsInfo;
use crate::doctor::{DoctorFixReport, DoctorReport};
use crate::event::EventsQuery;
use crate::image::{
    BootstrapRequest, ImageDetails, ImageQuery, ImageRemoveQuery, ImageSummary, ImagesQuery, ImportQuery,
    PrepareQuery, PullRequest, VerifyReport, WarmRequest,
};
use crate::kernel::{BuildQuery, DistroRequest, KernelSummary};
use crate::network::{NetworkDetails, NetworkRequest, NetworkSummary};
use crate::operation::OperationsQuery;
use crate::prune::{PruneQuery, PruneReport};
use crate::ssh::{SshHosts, SshHostsQuery, SshQuery};
use crate::stats::VmStats;
use crate::system::{ShutdownRequest, SystemInfo};
use crate::template::TemplateSummary;
use crate::usage::DiskUsage;
use crate::vm::{
    ArchiveQuery, ArchiveUnpacked, AttachQuery, KillQuery, ListQuery, LogsQuery, PATH_STAT_HEADER, PathStat,
    RemoveQuery, RenameQuery, ResetQuery, StopQuery, VmDetails, VmSummary, WaitAnswer,
};
use connection::{Answer, exchange};

/// The daemon at one socket. Cheap to clone; nothing is open between calls.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client for the daemon that listens at `socket`. Does not connect yet.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Where the daemon listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The OpenAPI document.
    pub async fn openapi(&self) -> Result<Value, ClientError> {
        self.get("/openapi.json").await
    }

    /// What the daemon is and has.
    pub async fn info(&self) -> Result<SystemInfo, ClientError> {
        self.get("/v1/system/info").await
    }

    /// Ends the daemon, and with `drain` gives back what it keeps ready for VMs to come. VMs run on. It is about to end when this
    /// returns.
    pub async fn shut_down(&self, request: &ShutdownRequest) -> Result<(), ClientError> {
        self.post_json("/v1/system/shutdown", request).await.map(drop)
    }

    /// Who answers for the names of VMs.
    pub async fn dns(&self) -> Result<DnsInfo, ClientError> {
        self.get("/v1/dns").await
    }

    /// Every check of every capability, and of the daemon itself.
    pub async fn doctor(&self) -> Result<DoctorReport, ClientError> {
        self.get("/v1/system/doctor").await
    }

    /// What happened to which VM: the history, what happens next, or both. Dropping it ends it.
    pub async fn events(&self, query: &EventsQuery) -> Result<Events, ClientError> {
        let target = url::with_query("/v1/events", query);
        Ok(Events::new(
            self.send(Method::GET, &target, Upload::none()).await?.into_body(),
        ))
    }

    /// Operations that are over, and where their time went; the newest come last.
    pub async fn operations(&self, query: &OperationsQuery) -> Result<Vec<OperationTiming>, ClientError> {
        self.get(&url::with_query("/v1/operations", query)).await
    }

    /// Mends what can be mended safely, and checks again.
    pub async fn doctor_fix(&self) -> Result<Work<DoctorFixReport>, ClientError> {
        let answer = self
            .send(Method::POST, "/v1/system/doctor/fix", Upload::none())
            .await?;
        Ok(Work::new(answer.into_body()))
    }

    /// From now on, and until the daemon ends, an image has so many warm slots.
    pub async fn warm_image(&self, request: &WarmRequest) -> Result<(), ClientError> {
        self.post_json("/v1/images/warm", request).await.map(drop)
    }

    /// What everything takes on disk, and VMs in memory.
    pub async fn df(&self) -> Result<DiskUsage, ClientError> {
        self.get("/v1/system/df").await
    }

    /// What [`prune`](Self::prune) would delete.
    pub async fn prune_plan(&self, query: &PruneQuery) -> Result<PruneReport, ClientError> {
        self.get(&url::with_query("/v1/system/prune", query)).await
    }

    /// Deletes what nothing needs.
    pub async fn prune(&self, query: &PruneQuery) -> Result<PruneReport, ClientError> {
        self.post(&url::with_query("/v1/system/prune", query)).await
    }

    /// Makes a VM; it does not run yet.
    pub async fn create_vm(&self, config: &VmConfig) -> Result<VmSummary, ClientError> {
        self.post_json("/v1/vms", config).await?.json().await
    }

    /// The VMs that run, or all.
    pub async fn vms(&self, query: &ListQuery) -> Result<Vec<VmSummary>, ClientError> {
        self.get(&url::with_query("/v1/vms", query)).await
    }

    /// Everything about a VM, by name, id or unique id prefix.
    pub async fn vm(&self, vm: &str) -> Result<VmDetails, ClientError> {
        self.get(&url::vm(vm, "")).await
    }

    /// What every running VM takes.
    pub async fn stats(&self) -> Result<Vec<VmStats>, ClientError> {
        self.get("/v1/stats").await
    }

    /// What one running VM takes.
    pub async fn vm_stats(&self, vm: &str) -> Result<VmStats, ClientError> {
        self.get(&url::vm(vm, "/stats")).await
    }

    /// Removes a VM and everything that was its own.
    pub async fn remove_vm(&self, vm: &str, query: &RemoveQuery) -> Result<(), ClientError> {
        self.send(
            Method::DELETE,
            &url::with_query(&url::vm(vm, ""), query),
            Upload::none(),
        )
        .await
        .map(drop)
    }

    /// Starts a VM; answers when its main process was started.
    pub async fn start_vm(&self, vm: &str) -> Result<VmSummary, ClientError> {
        self.post(&url::vm(vm, "/start")).await
    }

    /// Undoes a start that is under way; answers when nothing of it is left.
    pub async fn cancel_vm(&self, vm: &str) -> Result<VmSummary, ClientError> {
        self.post(&url::vm(vm, "/cancel")).await
    }

    /// Shuts a VM down; answers when it is stopped.
    pub async fn stop_vm(&self, vm: &str, query: &StopQuery) -> Result<VmSummary, ClientError> {
        self.post(&url::with_query(&url::vm(vm, "/stop"), query)).await
    }

    /// Stops a VM and starts it again.
    pub async fn restart_vm(&self, vm: &str, query: &StopQuery) -> Result<VmSummary, ClientError> {
        self.post(&url::with_query(&url::vm(vm, "/restart"), query)).await
    }

    /// Ends a VM at once, or signals its main process.
    pub async fn kill_vm(&self, vm: &str, query: &KillQuery) -> Result<VmSummary, ClientError> {
        self.post(&url::with_query(&url::vm(vm, "/kill"), query)).await
    }

    /// Lets a VM's vCPUs stand still.
    pub async fn pause_vm(&self, vm: &str) -> Result<VmSummary, ClientError> {
        self.post(&url::vm(vm, "/pause")).await
    }

    /// Lets them go on.
    pub async fn resume_vm(&self, vm: &str) -> Result<VmSummary, ClientError> {
        self.post(&url::vm(vm, "/resume")).await
    }

    /// Drops what a VM wrote to `/` and keeps its work disk.
    pub async fn reset_vm(&self, vm: &str, query: &ResetQuery) -> Result<VmSummary, ClientError> {
        self.post(&url::with_query(&url::vm(vm, "/reset"), query)).await
    }

    /// Gives a VM another name.
    pub async fn rename_vm(&self, vm: &str, name: &str) -> Result<VmSummary, ClientError> {
        self.post(&url::with_query(
            &url::vm(vm, "/rename"),
            &RenameQuery {
                name: name.to_owned(),
            },
        ))
        .await
    }

    /// Waits until a VM does not run any more.
    pub async fn wait_vm(&self, vm: &str) -> Result<WaitAnswer, ClientError> {
        self.get(&url::vm(vm, "/wait")).await
    }

    /// What a VM's main process wrote, or its console.
    pub async fn logs(&self, vm: &str, query: &LogsQuery) -> Result<Logs, ClientError> {
        let target = url::with_query(&url::vm(vm, "/logs"), query);
        Ok(Logs::new(
            self.send(Method::GET, &target, Upload::none()).await?.into_body(),
        ))
    }

    /// A session with the main process, which may not have been started yet.
    pub async fn attach(&self, vm: &str, query: &AttachQuery) -> Result<Session, ClientError> {
        Session::open(&self.socket, &url::with_query(&url::vm(vm, "/attach"), query)).await
    }

    /// A session with a new process.
    pub async fn exec(&self, vm: &str, start: &ExecStart) -> Result<Session, ClientError> {
        let mut session = Session::open(&self.socket, &url::vm(vm, "/exec")).await?;
        session.start(start).await?;
        Ok(session)
    }

    /// What SSH clients must know of VMs.
    pub async fn ssh_hosts(&self, query: &SshHostsQuery) -> Result<SshHosts, ClientError> {
        self.get(&url::with_query("/v1/ssh", query)).await
    }

    /// A connection to the SSH server in a VM's agent.
    pub async fn ssh(&self, vm: &str, query: &SshQuery) -> Result<SshTunnel, ClientError> {
        SshTunnel::open(&self.socket, &url::with_query(&url::vm(vm, "/ssh"), query)).await
    }

    /// What stands at a path of the guest, and it as a tar. Dropping the body ends the copy.
    pub async fn archive(&self, vm: &str, path: &str) -> Result<(PathStat, AnswerBody), ClientError> {
        let target = url::with_query(
            &url::vm(vm, "/archive"),
            &ArchiveQuery {
                path: path.to_owned(),
            },
        );
        let answer = self.send(Method::GET, &target, Upload::none()).await?;
        let stat = answer
            .header(PATH_STAT_HEADER)
            .and_then(|text| serde_json::from_str(text).ok());
        let stat = stat.ok_or_else(|| {
            answer.broken(ProtocolError::Header {
                name: PATH_STAT_HEADER,
            })
        })?;
        Ok((stat, answer.into_body()))
    }

    /// Unpacks a tar into an existing folder of the guest.
    pub async fn unpack(
        &self,
        vm: &str,
        directory: &str,
        tar: Upload,
    ) -> Result<ArchiveUnpacked, ClientError> {
        let target = url::with_query(
            &url::vm(vm, "/archive"),
            &ArchiveQuery {
                path: directory.to_owned(),
            },
        );
        self.send(Method::PUT, &target, tar).await?.json().await
    }

    /// The images in the store.
    pub async fn images(&self) -> Result<Vec<ImageSummary>, ClientError> {
        self.get("/v1/images").await
    }

    /// What `image ls` shows of one image; `None` where there is no such image. Cheaper than [`image`](Self::image).
    pub async fn find_image(&self, reference: &str) -> Result<Option<ImageSummary>, ClientError> {
        let query = ImagesQuery {
            reference: Some(reference.to_owned()),
        };
        let found: Vec<ImageSummary> = self.get(&url::with_query("/v1/images", &query)).await?;
        Ok(found.into_iter().next())
    }

    /// Everything about an image.
    pub async fn image(&self, query: &ImageQuery) -> Result<ImageDetails, ClientError> {
        self.get(&url::with_query("/v1/images/inspect", query)).await
    }

    /// Removes an image's name, and the image when it was the last one.
    pub async fn remove_image(&self, query: &ImageRemoveQuery) -> Result<(), ClientError> {
        self.send(
            Method::DELETE,
            &url::with_query("/v1/images", query),
            Upload::none(),
        )
        .await
        .map(drop)
    }

    /// Fetches an image from a registry.
    pub async fn pull(&self, request: &PullRequest) -> Result<Work<ImageSummary>, ClientError> {
        Ok(Work::new(
            self.post_json("/v1/images/pull", request).await?.into_body(),
        ))
    }

    /// Makes an image from a Debian mirror.
    pub async fn bootstrap(&self, request: &BootstrapRequest) -> Result<Work<ImageSummary>, ClientError> {
        Ok(Work::new(
            self.post_json("/v1/images/bootstrap", request).await?.into_body(),
        ))
    }

    /// Takes the images of an archive into the store.
    pub async fn import(
        &self,
        query: &ImportQuery,
        archive: Upload,
    ) -> Result<Work<Vec<ImageSummary>>, ClientError> {
        let target = url::with_query("/v1/images/import", query);
        Ok(Work::new(
            self.send(Method::POST, &target, archive).await?.into_body(),
        ))
    }

    /// Reads every blob and every part of the base of an image and compares them with what was stored.
    pub async fn verify(&self, query: &ImageQuery) -> Result<Work<VerifyReport>, ClientError> {
        let target = url::with_query("/v1/images/verify", query);
        Ok(Work::new(
            self.send(Method::POST, &target, Upload::none())
                .await?
                .into_body(),
        ))
    }

    /// Makes an image's base.
    pub async fn prepare(&self, query: &PrepareQuery) -> Result<Work<ImageSummary>, ClientError> {
        let target = url::with_query("/v1/images/prepare", query);
        Ok(Work::new(
            self.send(Method::POST, &target, Upload::none())
                .await?
                .into_body(),
        ))
    }

    /// The kernel bundles.
    pub async fn kernels(&self) -> Result<Vec<KernelSummary>, ClientError> {
        self.get("/v1/kernels").await
    }

    /// Makes a kernel bundle from the distribution's package.
    pub async fn add_distro_kernel(
        &self,
        request: &DistroRequest,
    ) -> Result<Work<KernelSummary>, ClientError> {
        Ok(Work::new(
            self.post_json("/v1/kernels/distro", request).await?.into_body(),
        ))
    }

    /// Makes a kernel bundle from a tar with `vmlinux` and, if need be, `modules/…`.
    pub async fn add_kernel_files(&self, tar: Upload) -> Result<Work<KernelSummary>, ClientError> {
        Ok(Work::new(
            self.send(Method::POST, "/v1/kernels/files", tar)
                .await?
                .into_body(),
        ))
    }

    /// Compiles a kernel, out of the distribution's source or of what the tar holds: see [`BuildQuery`].
    pub async fn build_kernel(
        &self,
        query: &BuildQuery,
        tar: Upload,
    ) -> Result<Work<KernelSummary>, ClientError> {
        let target = url::with_query("/v1/kernels/build", query);
        Ok(Work::new(
            self.send(Method::POST, &target, tar).await?.into_body(),
        ))
    }

    /// Removes a kernel bundle.
    pub async fn remove_kernel(&self, id: &str) -> Result<(), ClientError> {
        let target = format!("/v1/kernels/{}", url::encode(id));
        self.send(Method::DELETE, &target, Upload::none()).await.map(drop)
    }

    /// Lets new VMs boot this kernel bundle.
    pub async fn set_default_kernel(&self, id: &str) -> Result<KernelSummary, ClientError> {
        self.post(&format!("/v1/kernels/{}/default", url::encode(id)))
            .await
    }

    /// The templates.
    pub async fn templates(&self) -> Result<Vec<TemplateSummary>, ClientError> {
        self.get("/v1/templates").await
    }

    /// Removes a template.
    pub async fn remove_template(&self, id: &str) -> Result<(), ClientError> {
        let target = format!("/v1/templates/{}", url::encode(id));
        self.send(Method::DELETE, &target, Upload::none()).await.map(drop)
    }

    /// Every network.
    pub async fn networks(&self) -> Result<Vec<NetworkSummary>, ClientError> {
        self.get("/v1/networks").await
    }

    /// Makes a network.
    pub async fn create_network(&self, request: &NetworkRequest) -> Result<NetworkSummary, ClientError> {
        self.post_json("/v1/networks", request).await?.json().await
    }

    /// Everything about a network.
    pub async fn network(&self, name: &str) -> Result<NetworkDetails, ClientError> {
        self.get(&format!("/v1/networks/{}", url::encode(name))).await
    }

    /// Removes a network that no VM is on.
    pub async fn remove_network(&self, name: &str) -> Result<(), ClientError> {
        let target = format!("/v1/networks/{}", url::encode(name));
        self.send(Method::DELETE, &target, Upload::none()).await.map(drop)
    }

    async fn get<T: DeserializeOwned>(&self, target: &str) -> Result<T, ClientError> {
        self.send(Method::GET, target, Upload::none()).await?.json().await
    }

    async fn post<T: DeserializeOwned>(&self, target: &str) -> Result<T, ClientError> {
        self.send(Method::POST, target, Upload::none())
            .await?
            .json()
            .await
    }

    async fn post_json(&self, target: &str, body: &impl Serialize) -> Result<Answer, ClientError> {
        let upload = Upload::json(body).map_err(|source| ClientError::Protocol {
            request: format!("POST {target}"),
            source,
        })?;
        self.send(Method::POST, target, upload).await
    }

    async fn send(&self, method: Method, target: &str, upload: Upload) -> Result<Answer, ClientError> {
        exchange(&self.socket, method, target, upload, &[]).await
    }
}
