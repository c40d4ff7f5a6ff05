//! Health per service and readiness per dependency.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// The state of something that a service depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dependency {
    /// It works.
    Up,
    /// It is away or catching up, and the service goes on with less.
    Degraded(String),
    /// It is away, and the service can't go on.
    Down(String),
}

/// The states of all dependencies of the services in a process.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
    inner: Arc<Mutex<States>>,
}

#[derive(Default)]
struct States {
    services: BTreeMap<&'static str, BTreeMap<&'static str, Dependency>>,
    /// Everything is mounted.
    started: bool,
    draining: bool,
}

impl States {
    fn serves(&self, service: &BTreeMap<&'static str, Dependency>) -> bool {
        let up = |dependency: &Dependency| !matches!(dependency, Dependency::Down(_));
        self.started && !self.draining && service.values().all(up)
    }
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Health")
    }
}

impl Default for Health {
    /// That of a process which nobody asks for it.
    fn default() -> Self {
        Self::new(HealthReporter::new())
    }
}

impl Health {
    pub(crate) fn new(reporter: HealthReporter) -> Self {
        Self {
            reporter,
            inner: Arc::default(),
        }
    }

    fn states(&self) -> std::sync::MutexGuard<'_, States> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports the state of one dependency of a service, named as in its contract.
    pub async fn report(&self, service: &'static str, dependency: &'static str, state: Dependency) {
        let serving = {
            let mut states = self.states();
            let before = states
                .services
                .entry(service)
                .or_default()
                .insert(dependency, state.clone());
            if before.as_ref() != Some(&state) && before.is_some() {
                tracing::info!(service, dependency, ?state, "dependency changed");
            }
            states
                .services
                .get(service)
                .is_some_and(|service| states.serves(service))
        };
        self.tell(service, serving).await;
        self.tell_all().await;
    }

    /// Says how the process as a whole is, which balancers ask for by no name.
    pub(crate) async fn tell_all(&self) {
        self.tell("", self.is_ready()).await;
    }

    async fn tell(&self, service: &'static str, serving: bool) {
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        self.reporter.set_service_status(service, status).await;
    }

    /// Says that everything is mounted.
    pub async fn start(&self) {
        let services: Vec<(&'static str, bool)> = {
            let mut states = self.states();
            states.started = true;
            let serves = states
                .services
                .iter()
                .map(|(name, service)| (*name, states.serves(service)));
            serves.collect()
        };
        for (service, serving) in services {
            self.tell(service, serving).await;
        }
        self.tell_all().await;
    }

    /// Says NOT_SERVING for everything, so that balancers turn away.
    pub async fn drain(&self) {
        let services: Vec<_> = {
            let mut states = self.states();
            states.draining = true;
            states.services.keys().copied().collect()
        };
        for service in services.into_iter().chain([""]) {
            self.reporter
                .set_service_status(service, ServingStatus::NotServing)
                .await;
        }
    }

    /// True when every service is there and can do its work, and the process is not draining.
    pub fn is_ready(&self) -> bool {
        let states = self.states();
        states.started && !states.draining && states.services.values().all(|service| states.serves(service))
    }

    /// Everything known, as JSON.
    pub fn to_json(&self) -> serde_json::Value {
        let ready = self.is_ready();
        let states = self.states();
        let services: serde_json::Map<_, _> = states
            .services
            .iter()
            .map(|(service, dependencies)| {
                let shown = dependencies.iter().map(|(name, state)| {
                    let text = match state {
                        Dependency::Up => "up".to_string(),
                        Dependency::Degraded(why) => format!("degraded: {why}"),
                        Dependency::Down(why) => format!("down: {why}"),
                    };
                    (name.to_string(), text.into())
                });
                (service.to_string(), serde_json::Value::Object(shown.collect()))
            })
            .collect();
        serde_json::json!({"ready": ready, "draining": states.draining, "services": services})
    }
}

#[cfg(test)]
mod tests {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus as Told;
    use tonic_health::pb::health_server::Health as _;
    use tonic_health::server::HealthService;

    use super::*;

    #[tokio::test]
    async fn who_asks_for_no_service_hears_whether_all_of_them_serve() {
        let reporter = HealthReporter::new();
        let asked = HealthService::from_health_reporter(reporter.clone());
        let health = Health::new(reporter);
        let serves = async |service: &str| {
            let request = HealthCheckRequest {
                service: service.into(),
            };
            let answer = asked.check(tonic::Request::new(request)).await.unwrap().into_inner();
            answer.status() == Told::Serving
        };
        health.tell_all().await;
        assert!(!serves("").await, "it has not started yet");
        health.report("a", "store", Dependency::Up).await;
        health.report("b", "store", Dependency::Up).await;
        assert!(!serves("").await && !serves("a").await);
        health.start().await;
        assert!(serves("").await && serves("a").await && serves("b").await);
        health.report("b", "store", Dependency::Degraded("slow".into())).await;
        assert!(serves("").await);
        health.report("b", "store", Dependency::Down("away".into())).await;
        assert!(!serves("").await && serves("a").await && !serves("b").await);
        health.report("b", "store", Dependency::Up).await;
        assert!(serves("").await);
        health.drain().await;
        assert!(!serves("").await && !serves("a").await);
        health.report("b", "store", Dependency::Up).await;
        assert!(!serves("").await, "it drains");
    }
}
