//! Device threads: each holds the conversation with the back ends of one device.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use anemone_ipc::vmm::{Device, Event};
use anemone_virtio::{Bounce, Connected, FrontEnd, GuestRam, Limits, Notice, VirtioPci, WorkQueue};

use crate::error::Error;
use crate::run::Happenings;
use crate::threads::{Role, Threads};

/// How long a back end may take to answer. It may have to finish disk requests first.
const PATIENCE: Duration = Duration::from_secs(10);

/// virtio device type of network cards.
const NET: u16 = 1;
/// Features of a network card that need a control queue: CTRL_GUEST_OFFLOADS, CTRL_VQ, CTRL_RX,
/// CTRL_VLAN, GUEST_ANNOUNCE, MQ, CTRL_MAC_ADDR, and RSS (virtio 1.3, 5.1.3).
const NEED_CONTROL_QUEUE: u64 =
    1 << 2 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 21 | 1 << 22 | 1 << 23 | 1 << 60;

/// Back ends offer what needs a control queue also where the front end is to serve that queue, which
/// this one does not: it is there only if the back end has it, behind the pairs of queues.
fn withheld(device: &Device) -> u64 {
    match device.device_type {
        NET if device.queues.is_multiple_of(2) => NEED_CONTROL_QUEUE,
        _ => 0,
    }
}

/// A device whose back end is being asked what it offers.
pub struct Starting {
    id: String,
    answer: Receiver<Result<Connected, Error>>,
    go: Sender<Arc<VirtioPci>>,
    pub work: Arc<WorkQueue>,
}

impl Starting {
    /// Gives the thread of a device its work.
    pub fn begin(
        config: &Device,
        socket: UnixStream,
        ram: Arc<GuestRam>,
        bounce: Option<Bounce>,
        happenings: Arc<Happenings>,
        threads: &mut Threads,
    ) -> Result<Self, Error> {
        let (tell, answer) = mpsc::channel();
        let (go, wait) = mpsc::channel::<Arc<VirtioPci>>();
        let work = Arc::new(WorkQueue::new().map_err(Error::os("eventfd"))?);
        let id = config.id.clone();
        let limits = Limits {
            queues: config.queues,
            config_size: config.config_size,
            // Some network back ends leave the configuration to the front end.
            config_optional: config.device_type == NET,
            withheld: withheld(config),
            patience: PATIENCE,
        };
        let body = {
            let (id, work) = (id.clone(), work.clone());
            move |restricted: Result<(), Error>| {
                let connect = || {
                    restricted?;
                    FrontEnd::connect(socket, limits, bounce).map_err(|source| Error::Device {
                        id: id.clone(),
                        source,
                    })
                };
                let (front_end, offer) = match connect() {
                    Ok((front_end, connected)) => (front_end, Ok(connected)),
                    Err(e) => {
                        // If nobody listens any more the machine is not going to be.
                        let _ = tell.send(Err(e));
                        return;
                    }
                };
                // As above: without a listener, `wait` fails next.
                let _ = tell.send(offer);
                let Ok(device) = wait.recv() else { return };
                let tell = |notice| happenings.device(event(&id, notice));
                let error = front_end.run(&device, &ram, &work, &tell);
                happenings.fail(Event::Failed {
                    message: format!("device `{id}`: its thread cannot wait: {error}"),
                });
            }
        };
        threads.give(&Role::Device(id.clone()), body)?;
        Ok(Self {
            id,
            answer,
            go,
            work,
        })
    }

    /// Waits for the back end's answer. The second value lets the thread go on.
    pub fn finish(self) -> Result<(Connected, Sender<Arc<VirtioPci>>), Error> {
        let gone = || Error::Config(format!("device `{}`: its thread ended", self.id));
        let connected = self.answer.recv().map_err(|_| gone())??;
        Ok((connected, self.go))
    }
}

fn event(id: &str, notice: Notice) -> Event {
    let id = id.to_owned();
    match notice {
        Notice::Lost { connection, reason } => Event::BackendLost {
            id,
            connection,
            reason,
        },
        Notice::Back { connection } => Event::BackendBack { id, connection },
        Notice::Unfit { reason } => Event::BackendUnfit { id, reason },
    }
}

/// A device of a running machine.
pub struct Running {
    pub id: String,
    pub work: Arc<WorkQueue>,
    pub function: Arc<VirtioPci>,
}
