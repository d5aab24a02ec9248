//! The agent's end of the socket to PID 1; see [`crate::supervisor`] for what is said.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{RecvFlags, SendFlags, recv, send};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use crate::fd;
use crate::supervisor::{INIT_ORDER, SHUTDOWN_NOTE};

/// The longest message of PID 1's.
const MAX_MESSAGE: usize = 256;

struct Order {
    namespace: i32,
    answer: oneshot::Sender<Result<(), String>>,
}

/// What orders are given with.
#[derive(Clone, Debug)]
pub(crate) struct Pid1 {
    orders: mpsc::Sender<Order>,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Order")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Pid1 {
    /// Takes the socket over. The second value answers once PID 1 was asked to end the machine.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<(Self, oneshot::Receiver<()>)> {
        let socket = fd::register(socket)?;
        let (orders, receiver) = mpsc::channel(1);
        let (asked, shutdown) = oneshot::channel();
        tokio::spawn(attend(socket, receiver, asked));
        Ok((Self { orders }, shutdown))
    }

    /// Orders PID 1 to become the image's init, in the namespace behind one of the agent's descriptors.
    pub(crate) async fn become_init(&self, namespace: i32) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        let gone = || "PID 1 does not listen any more".to_owned();
        self.orders
            .send(Order { namespace, answer })
            .await
            .map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
    }
}

async fn attend(socket: AsyncFd<OwnedFd>, mut orders: mpsc::Receiver<Order>, asked: oneshot::Sender<()>) {
    let mut asked = Some(asked);
    let mut pending: Option<oneshot::Sender<Result<(), String>>> = None;
    loop {
        tokio::select! {
            order = orders.recv(), if pending.is_none() => {
                let Some(order) = order else { return };
                let text = format!("{INIT_ORDER}{}", order.namespace);
                match send(socket.as_fd(), text.as_bytes(), SendFlags::NOSIGNAL) {
                    Ok(_) => pending = Some(order.answer),
                    Err(error) => drop(order.answer.send(Err(error.to_string()))),
                }
            }
            message = receive(&socket) => match message {
                Ok(message) if message == SHUTDOWN_NOTE => {
                    if let Some(asked) = asked.take() {
                        let _ = asked.send(());
                    }
                }
                // Its end closes when it executes something else, which is what was ordered.
                Ok(message) if message.is_empty() => {
                    if let Some(pending) = pending.take() {
                        drop(pending.send(Ok(())));
                    }
                    return;
                }
                Ok(message) => {
                    if let Some(pending) = pending.take() {
                        drop(pending.send(Err(String::from_utf8_lossy(&message).into_owned())));
                    }
                }
                Err(_) => return,
            },
        }
    }
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    loop {
        let mut guard = socket.readable().await?;
        let mut message = [0; MAX_MESSAGE];
        match recv(socket.as_fd(), &mut message[..], RecvFlags::DONTWAIT) {
            Ok((_, length)) => return Ok(message[..length.min(MAX_MESSAGE)].to_vec()),
            Err(rustix::io::Errno::AGAIN) => guard.clear_ready(),
            Err(rustix::io::Errno::INTR) => {}
            // The end of a socket that still had something to say.
            Err(rustix::io::Errno::CONNRESET) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    /// Answers an order as PID 1 does: with a text, or by closing.
    fn answer(pid1: OwnedFd, text: Option<&'static str>) -> std::thread::JoinHandle<Option<OwnedFd>> {
        std::thread::spawn(move || {
            let mut order = [0; 64];
            let (_, length) = recv(&pid1, &mut order[..], RecvFlags::empty()).unwrap();
            assert_eq!(&order[..length], b"init 17");
            send(&pid1, text?.as_bytes(), SendFlags::empty()).unwrap();
            Some(pid1)
        })
    }

    #[tokio::test]
    async fn orders_are_answered_by_words_or_by_silence() {
        let (agents, pid1) = pair();
        let (orders, _shutdown) = Pid1::new(agents).unwrap();
        let refusing = answer(pid1, Some("no such file"));
        assert_eq!(orders.become_init(17).await, Err("no such file".to_owned()));
        let executing = answer(refusing.join().unwrap().unwrap(), None);
        assert_eq!(orders.become_init(17).await, Ok(()));
        assert!(executing.join().unwrap().is_none());
        assert!(orders.become_init(17).await.is_err());
    }

    #[tokio::test]
    async fn a_request_to_end_is_passed_on() {
        let (agents, pid1) = pair();
        let (_orders, shutdown) = Pid1::new(agents).unwrap();
        for _ in 0..2 {
            send(&pid1, SHUTDOWN_NOTE, SendFlags::empty()).unwrap();
        }
        shutdown.await.unwrap();
    }
}
